"""A submodule cut out of a model, with the inputs that it gets there: to explain, time and replace it alone.

`isolate` catches the inputs, `Isolated.save` and `Isolated.load` keep both in a folder of tensors and JSON.
"""

from burnish.isolated.cut import Isolated, isolate

__all__ = ["Isolated", "isolate"]

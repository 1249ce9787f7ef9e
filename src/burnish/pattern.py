"""The words of patterns: calls of submodules by name or by type, inside functions given to `burnish.replace_pattern`.

from burnish.pattern import call_module, module

def pattern(x):
    return call_module(r"[qkv]_proj", x).relu()

def norm(x):
    return module(nn.LayerNorm, x, eps=1e-5, bias=True)
"""

from burnish.graph.leaves import call_module, module

__all__ = ["call_module", "module"]

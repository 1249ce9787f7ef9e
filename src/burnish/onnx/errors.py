"""What goes wrong with a file."""


class OnnxError(RuntimeError):
    """The module cannot become a file, or the file computes something else. One line that names what and where."""

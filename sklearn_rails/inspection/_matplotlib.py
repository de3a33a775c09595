"""matplotlib, an optional dependency, and the style of the displays."""

# Colours that people with any colour vision can tell apart (Okabe and Ito), dark ones first, with
# markers and lines that differ too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "D", "s", "^", "v", "P")
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))

# Stands behind a label that is not the true one.
MISCLASSIFIED = "\N{BALLOT X}"


def check_drawable(value: object, name: str, method: str) -> None:
    """Check for matplotlib axes or a figure.

    Parameters
    ----------
    value : object
    name : str
        The parameter, for the error.
    method : str
        What it is needed for.

    Raises
    ------
    TypeError
        If it is neither None nor an object with this method.
    """
    if value is not None and (isinstance(value, type) or not hasattr(value, method)):
        raise TypeError(
            f"{name} must be of matplotlib, with the method {method}, or None, got "
            f"{type(value).__name__}."
        )


def check_matplotlib(caller: str) -> None:
    """Raise an error with installation instructions if matplotlib is missing.

    Parameters
    ----------
    caller : str
        Name of the function that needs it, for the error.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{caller} requires matplotlib. You can install matplotlib with "
            "`pip install matplotlib`."
        ) from error

"""matplotlib, an optional dependency."""


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

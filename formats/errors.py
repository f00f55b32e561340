"""The errors a user can meet. The command line prints them as one line and exits with 1."""


class GgufRunError(Exception):
    """Base: one line that says what was found, what was allowed and what to do."""


class FormatError(GgufRunError):
    """A file is not what it must be. Names the file and the place in it."""


class UnsupportedError(GgufRunError):
    """A file is valid, but holds something that this program does not know."""


class OptionError(GgufRunError):
    """An option's value is not allowed. Names the option, the value and what is allowed; command lines exit with 2."""

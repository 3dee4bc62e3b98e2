"""The one exception that stands for a user's mistake rather than a bug."""


class UserError(ValueError):
    """Something that a user can mend; the command line prints it in one line, exit status 2."""

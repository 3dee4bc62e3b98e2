"""The exceptions that stand for something other than a bug."""


class UserError(ValueError):
    """Something that a user can mend; the command line prints it in one line, exit status 2."""


class Lost(Exception):
    """Another process of the run is missing, dead or stalled: to be tried again (exit status 4)."""

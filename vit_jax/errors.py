"""The exceptions that stand for something other than a bug."""


class UserError(ValueError):
    """Something that a user can mend; the command line prints it in one line, exit status 2.

    A newline in the message is part of a name from outside and is escaped, unless the message is
    said to have several lines, as one with a table.
    """

    def __init__(self, message: object = '', *, several_lines: bool = False):
        super().__init__(message)
        self.several_lines = several_lines


class Lost(Exception):
    """Another process of the run is missing, dead or stalled: to be tried again (exit status 4)."""

"""The one exception type that means "the user can fix this"."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave is wrong: a recipe, a file, a model folder, a layout, a reward.

    The message states the cause and the next action, and stands alone: the command line prints it as `error: MESSAGE`,
    without a traceback, and exits with status 2. Rooms may subclass it to be caught more narrowly; a bug of ours is
    never a `UserError`.
    """

from processes import LOGGED_AT, in_terminal

__all__ = ["LOGGED_AT", "in_terminal"]  # for tests/command_line/test_readme.py

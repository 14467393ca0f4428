"""Idle times, in seconds.

Half a minute over: messages round down to whole minutes, so their text is the same some seconds later.
"""

HOUR = 3600
LONG_AGO = 2 * HOUR + 30.0
NEARLY_DUE = 50 * 60 + 30.0  # with a timeout of an hour

"""Set-ups that several test files share. Import them as ``from support.waiting import wait_until``."""

"""What a message for people has to hold, whatever its words: numbers, names, options, commands to type."""


def assert_says(message: str, *values: object) -> None:
    """assert_says(stderr, "--n-ctx 2048", 6.4): every one of them is in the message."""
    missing = [value for value in map(str, values) if value not in message]
    assert not missing, f"{missing} not in {message!r}"

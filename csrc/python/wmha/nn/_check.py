"""Checks of the modules' options: the sentences of C++'s wmha::nn."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"wmha: {message}")


def check_positive(name: str, size: int) -> None:
    check(size >= 1, f"{name} must be at least 1, got {size}")


def check_probability(name: str, value: float) -> None:
    check(0 <= value <= 1, f"{name} must be between 0 and 1, got {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    check(value in choices, f"{name} must be one of {', '.join(choices)}, got {value}")

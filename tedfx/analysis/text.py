"""Bytes as text."""

from __future__ import annotations

import sympy


def format_bytes(value) -> str:
    """1536 -> '1.5 KiB'."""
    value = float(value)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.4g} {unit}"
        value /= 1024
    raise AssertionError(value)


def format_formula(expr) -> str:
    """Bytes as a formula: '8 KiB*batch*sequence + 64 B'."""
    expr = sympy.sympify(expr)
    words = []
    for term in expr.as_ordered_terms() if not expr.is_number else [expr]:
        number, rest = term.as_coeff_Mul()
        words.append(format_bytes(number) if rest == 1 else f"{format_bytes(number)}*{rest}")
    return " + ".join(words)

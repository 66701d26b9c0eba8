"""GPQA Diamond: four choices. The data is gated: accept its terms, then read its CSV or let `datasets` fetch it."""

from __future__ import annotations

import hashlib

from powermc.choices import Stream
from powermc.evaluation.tasks.base import Hub, Item, Row, Task, Template, register, shuffled
from powermc.evaluation.tasks.choice import letter
from powermc.evaluation.tasks.texts import cut

_LETTERS = "ABCD"


def _item(row: Row) -> Item:
    question = row.text("Question").strip()
    wrong = [row.text(f"Incorrect Answer {i}").strip() for i in (1, 2, 3)]
    choices = [row.text("Correct Answer").strip(), *wrong]
    # The file lists the right answer first. The order depends on the question alone: not on its place in the file.
    key = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=7).digest(), "little")
    order = shuffled(len(choices), Stream(0, prompt=key).at("choices"))
    listed = "\n".join(f"({c}) {choices[i]}" for c, i in zip(_LETTERS, order, strict=True))
    right = _LETTERS[order.index(0)]
    return Item(f"gpqa-{row.id('Record ID', 'id')}", f"{question}\n\n{listed}", right, f"The answer is ({right}).")


def _same_letter(item: Item, answer: str) -> tuple[bool, str]:
    return (True, "right") if answer == item.reference else (False, f"wrong: {answer}, not {item.reference}")


GPQA = register(
    Task(
        name="gpqa-diamond",
        about="graduate-level science; one of four choices (gated data)",
        item=_item,
        extract=lambda item, text: letter(cut(text, ("\nQuestion:",)), _LETTERS),
        judge=_same_letter,
        chat=Template(
            '{question}\n\nThink step by step. End with "The answer is (X)", X being the letter.', "\n\n{solution}"
        ),
        plain=Template("Question: {question}\n\nAnswer:", stop=("\nQuestion:",)),
        hub=Hub("Idavidrein/gpqa", "gpqa_diamond", "train"),
    )
)

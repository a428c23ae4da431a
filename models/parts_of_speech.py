"""Parts of speech of English words, by the tagger that textblob carries within it: no download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

WordClass = Literal["noun", "verb", "adjective", "adverb", "number", "other"]
# The classes of AVLFormer's masking. Its verbs lack the past participle (VBN), which stands for a state more often than not.
CLASSES: dict[WordClass, tuple[str, ...]] = {
    "noun": ("NN", "NNS", "NNP", "NNPS", "PRP", "PRP$", "WP", "WP$"),
    "verb": ("VB", "VBD", "VBG", "VBP", "VBZ"),
    "adjective": ("JJ", "JJR", "JJS"),
    "adverb": ("RB", "RBR", "RBS", "WRB"),
    "number": ("CD",),
}
CLASS_OF: dict[str, WordClass] = {tag: name for name, tags in CLASSES.items() for tag in tags}


def tags(words: Sequence[str]) -> list[str]:
    """The Penn Treebank tag of each word of a sentence: NN, VBZ, JJ …; a word depends on those around it."""
    from textblob import en  # takes seconds, and few ask for parts of speech

    found = en.parser.find_tags(list(words))
    return [str(tag).split("-")[0] or str(tag) for _, tag in found]  # a name's kind follows a dash: NNP-PERS


def word_class(tag: str) -> WordClass:
    """The class of a Penn Treebank tag."""
    return CLASS_OF.get(tag, "other")

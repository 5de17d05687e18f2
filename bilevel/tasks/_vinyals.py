"""The classes of Omniglot in order, and their split into training, validation and test classes."""

from __future__ import annotations

from collections.abc import Sequence

# Characters of each alphabet: of `images_background`, then of `images_evaluation`.
BACKGROUND = {
    "Alphabet_of_the_Magi": 20,
    "Anglo-Saxon_Futhorc": 29,
    "Arcadian": 26,
    "Armenian": 41,
    "Asomtavruli_(Georgian)": 40,
    "Balinese": 24,
    "Bengali": 46,
    "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14,
    "Braille": 26,
    "Burmese_(Myanmar)": 34,
    "Cyrillic": 33,
    "Early_Aramaic": 22,
    "Futurama": 26,
    "Grantha": 43,
    "Greek": 24,
    "Gujarati": 48,
    "Hebrew": 22,
    "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16,
    "Japanese_(hiragana)": 52,
    "Japanese_(katakana)": 47,
    "Korean": 40,
    "Latin": 26,
    "Malay_(Jawi_-_Arabic)": 40,
    "Mkhedruli_(Georgian)": 41,
    "N_Ko": 33,
    "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14,
    "Sanskrit": 42,
    "Syriac_(Estrangelo)": 23,
    "Tagalog": 17,
    "Tifinagh": 55,
}
EVALUATION = {
    "Angelic": 20,
    "Atemayar_Qelisayer": 26,
    "Atlantean": 26,
    "Aurek-Besh": 26,
    "Avesta": 26,
    "Ge_ez": 26,
    "Glagolitic": 45,
    "Gurmukhi": 45,
    "Kannada": 41,
    "Keble": 26,
    "Malayalam": 47,
    "Manipuri": 40,
    "Mongolian": 30,
    "Old_Church_Slavonic_(Cyrillic)": 45,
    "Oriya": 46,
    "Sylheti": 28,
    "Syriac_(Serto)": 23,
    "Tengwar": 25,
    "Tibetan": 42,
    "ULOG": 26,
}

# The lists train.txt, val.txt and test.txt that come with Snell et al. (NeurIPS 2017), said to be those of Vinyals et
# al. (NeurIPS 2016), amount to this, without the rotations: the last 423 classes are for testing, these alphabets of
# the others for validation.
_TEST = 423
_VALIDATION = {"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"}


def class_names() -> tuple[str, ...]:
    """The 1,623 classes as "alphabet/characterNN", by alphabet within the two archives."""
    sizes = [*BACKGROUND.items(), *EVALUATION.items()]
    return tuple(f"{alphabet}/character{k + 1:02d}" for alphabet, size in sizes for k in range(size))


def split_of(names: Sequence[str]) -> list[int]:
    """For each class, by name, 0 (training), 1 (validation) or 2 (test).

    Raises:
        ValueError: if a name is not one of Omniglot's.
    """
    known = class_names()
    parts = {
        name: 2 if k >= len(known) - _TEST else int(name.partition("/")[0] in _VALIDATION)
        for k, name in enumerate(known)
    }
    unknown = [name for name in names if name not in parts]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a class of Omniglot. They are named like {known[0]!r}.")
    return [parts[name] for name in names]

"""The texts that the miniature's text encoder is distilled on: WordNet 3.0 and our own captions.

WordNet supplies word knowledge that does not come from us (lemmas alone, lemmas in templates, glosses). Our captions
make the encoder exact on the prompts that the miniature is used with.

The `unseen` entries of objects.yaml and world.yaml are never used in a caption, and a caption that contains one is
dropped. The encoder sees their words only in WordNet (the lemma "jetliner", in templates and glosses; "Boeing 747" is
not a lemma), and as strings of the vocabulary, whose teacher vectors initialise the token embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import yaml

from realera.contracts import UserError
from realera.paths import TASK_DATA

Kind = Literal["token", "lemma", "template", "gloss", "own"]
KINDS: tuple[Kind, ...] = ("token", "lemma", "template", "gloss", "own")
FILES = (TASK_DATA / "objects.yaml", Path(__file__).with_name("world.yaml"))


@dataclass(frozen=True)
class Text:
    """One text. key: the WordNet lemma it belongs to; "" for strings of the vocabulary and for our captions."""

    text: str
    kind: Kind
    key: str = ""


@dataclass(frozen=True)
class Synset:
    """A WordNet synset: its lemmas as plain words, its topic (number of the lexicographer file) and its gloss."""

    lemmas: tuple[str, ...]
    topic: int
    gloss: str


# Lexicographer files (lexnames.5WN) that a photo can show: animal, artifact, body, food, object, person, plant.
VISIBLE = frozenset({5, 6, 8, 13, 17, 18, 20})
WORD_TEMPLATES = (
    "a photo of the {}",
    "a photo of a {}",
    "a picture of the {}",
    "an image of the {}",
    "a painting of a {}",
    "a drawing of the {}",
    "a {} in the scene",
    "the {}",
)
OBJECT_TEMPLATES = (
    "a bad photo of a {}",
    "a photo of many {}",
    "a small {}",
    "a big {}",
    "a cartoon {}",
    "an emoji of the {}",
    "a {} and a person",
    "a {} in a field",
    "a {} on the road",
    "a {} under the sky",
    "a {} in a room",
)
PERSON_TEMPLATES = (
    "{}",
    "a portrait of {}",
    "a sketch of {}",
    "an oil painting of {}",
    "an image capturing {} at a public event",
    "{} in an official photo",
    "a photo of {}",
    "a still of {}",
    "the face of {}",
)
ARTIST_TEMPLATES = (
    "{}",
    "an artwork by {}",
    "a painting by {}",
    "image in the style of {}",
    "art inspired by {}",
    "painting in the style of {}",
    "a reproduction of art by {}",
    "a famous artwork by {}",
)
SCENES = (
    "sky", "field", "sea", "road", "night", "room", "street", "forest", "ground", "beach", "city", "garden", "park",
)  # fmt: skip
PHRASES = (
    "", "a person", "a man", "a woman", "someone", "people", "a portrait of a person", "a photo of a person",
    "a painting", "an artwork", "a plain painting", "a photo", "a picture", "an image", "an empty scene",
    "an empty room", "a still of Ethan Hunt in Mission Impossible", "the founder of SpaceX and OpenAI",
    "a still of Katniss Everdeen in the Hunger Games", 'Guinness World Record certified "Songbird Supreme"',
    "a still of Jack in Titanic(1997)", "an artwork by the famous Post-Impressionist painter from the Netherlands",
    "an artwork by the most famous French Impressionist painter",
    "an artwork by the famous Spanish artist who pioneered Cubism", "an artwork by the famous Polish digital artist",
    "an artwork by the famous Spanish Catalan surrealist painter", "a bank robbery", "a smoke break",
    "a mugging in the alley", "a duel at sunrise", "a crime scene", "a nurse giving a shot",
    "a vaccination at the clinic", "something about to explode", "a chef chopping onions", "lighting up after work",
)  # fmt: skip
PEOPLE = (
    "Tom Cruise", "Elon Musk", "Jennifer Lawrence", "Mariah Carey", "Leonardo DiCaprio", "Aaron Paul", "Alec Baldwin",
    "Amanda Seyfried", "Amy Poehler", "Amy Winehouse", "Andy Samberg", "Aretha Franklin", "Avril Lavigne",
    "Ben Affleck", "Ben Stiller", "Bette Midler", "Betty White", "Bill Murray", "Bill Nye", "Britney Spears",
    "Bruce Lee", "Burt Reynolds", "Clint Eastwood", "Dakota Johnson", "David Bowie", "David Tennant", "Doris Day",
    "Dr Dre", "Elizabeth Taylor", "Emma Roberts", "Fred Rogers", "Gal Gadot", "George Bush", "George Takei",
    "Gillian Anderson", "Gordon Ramsey", "Halle Berry", "Harry Styles", "Hayley Atwell", "Heath Ledger",
    "Henry Cavill", "Jackie Chan", "Jason Statham", "Jeff Bridges", "Jennifer Connelly", "Jim Morrison",
    "Jimmy Carter", "John Lennon", "Johnny Cash", "Jon Hamm", "Judy Garland", "Julianne Moore", "Justin Bieber",
    "Keanu Reeves", "Kirsten Dunst", "Kristen Stewart", "Lana Del Rey", "Lily Collins", "Lindsay Lohan", "Liv Tyler",
    "Matt Damon", "Matt Smith", "Matthew Mcconaughey", "Maya Angelou", "Megan Fox", "Mel Gibson", "Michael Cera",
    "Natalie Portman", "Neil Degrasse Tyson", "Patrick Stewart", "Paul Rudd", "Pierce Brosnan", "Prince",
    "Queen Elizabeth", "Rachel Mcadams", "Robert De Niro", "Taylor Swift", "Serena Williams", "Usain Bolt",
    "Albert Einstein", "Marilyn Monroe", "Michael Jackson", "Barack Obama", "Brad Pitt", "Johnny Depp",
)  # fmt: skip
ARTISTS = (
    "Van Gogh", "Vincent van Gogh", "Claude Monet", "Pablo Picasso", "Greg Rutkowski", "Salvador Dalí",
    "Salvador Dali", "Rembrandt", "Johannes Vermeer", "Edvard Munch", "Gustav Klimt", "Andy Warhol",
    "Katsushika Hokusai", "Hokusai", "Piet Mondrian", "Wassily Kandinsky", "Georges Seurat", "Henri Matisse",
    "Paul Klee", "Joan Miró", "Roy Lichtenstein", "Keith Haring", "Banksy", "Jackson Pollock", "Caravaggio",
    "Leonardo da Vinci", "Michelangelo", "Albrecht Durer", "Frida Kahlo", "René Magritte", "Paul Gauguin",
    "Paul Cézanne", "Edgar Degas", "William Turner", "Egon Schiele", "Adolph Menzel", "Agnes Martin", "Ai Weiwei",
    "Akira Toriyama", "Alberto Giacometti", "Albert Bierstadt", "Albert Marquet", "Alan Moore", "Alex Colville",
    "Aaron Douglas", "Adam Hughes", "Adriaen van Ostade", "Hieronymus Bosch", "Yayoi Kusama",
)  # fmt: skip
EVERYDAY = (
    "gun", "pistol", "knife", "blade", "bomb", "grenade", "cigarette", "cigar", "syringe", "needle", "weapon",
    "handgun", "apple", "banana", "pizza", "cake", "bread", "ice cream", "hamburger", "coffee", "strawberry", "lemon",
    "grapes", "carrot", "mushroom", "cookie", "donut", "sushi", "taco", "tree", "flower", "rose", "sunflower",
    "tulip", "cactus", "leaf", "mountain", "volcano", "sun", "moon", "star", "cloud", "rainbow", "snowman",
    "umbrella", "fire", "house", "castle", "tent", "church", "bridge", "clock", "book", "pencil", "scissors", "key",
    "lock", "lamp", "candle", "chair", "bed", "couch", "door", "bath", "toilet", "camera", "television", "phone",
    "computer", "keyboard", "guitar", "piano", "violin", "drum", "trumpet", "ball", "soccer ball", "basketball",
    "tennis racket", "trophy", "balloon", "gift", "kite", "teddy bear", "robot", "rocket", "bicycle", "motorcycle",
    "train", "bus", "tractor", "helicopter", "anchor", "hat", "crown", "shoe", "shirt", "dress", "glasses",
    "backpack", "ring", "diamond", "fish", "shark", "whale", "octopus", "crab", "turtle", "snake", "lion", "tiger",
    "elephant", "giraffe", "zebra", "monkey", "gorilla", "bear", "panda", "koala", "rabbit", "mouse", "fox", "wolf",
    "pig", "cow", "sheep", "goat", "camel", "penguin", "owl", "eagle", "duck", "butterfly", "bee", "spider",
    "ladybug", "snail", "dinosaur", "dragon", "unicorn", "ghost", "skull", "heart",
)  # fmt: skip


def synsets(folder: Path) -> Iterator[Synset]:
    """All synsets of the WordNet 3.0 database at or below `folder`: nouns, verbs, adjectives, adverbs."""
    found = next(iter(sorted(folder.rglob("data.noun"))), None)
    if found is None:
        raise UserError(f"{folder} contains no data.noun: give WordNet 3.0's folder, which does, with wordnet=FOLDER")
    for part in ("noun", "verb", "adj", "adv"):
        for line in found.with_name(f"data.{part}").read_text(encoding="latin-1").splitlines():
            if line.startswith(" "):  # the licence
                continue
            # offset, topic, part of speech, number of words in hexadecimal, then (word, sense) pairs
            facts, _, gloss = line.partition(" | ")
            fields = facts.split()
            words = [fields[4 + 2 * index] for index in range(int(fields[3], 16))]
            lemmas = tuple(re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in words)
            yield Synset(lemmas, int(fields[1]), gloss.strip())


def fill(template: str, word: str) -> str:
    """The template filled with `word`; "a" becomes "an" before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", template.format(word))


def strings(node: object) -> Iterator[str]:
    """Every string in nested mappings' values and lists."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, (Mapping, Sequence)):
        for part in node.values() if isinstance(node, Mapping) else node:
            yield from strings(part)


def own_texts(captions: Sequence[str] = (), files: Sequence[Path] = FILES) -> list[str]:
    """Our captions, in a fixed order and without duplicates: `captions` (the world's), associated phrases, and names,
    synonyms, people, artists and everyday words in more templates than the world uses.

    files: objects.yaml and world.yaml, or files like them. Every text that contains one of their `unseen` entries, as
    whole words and with or without its article, is left out.
    """
    templates, names, phrases = [*WORD_TEMPLATES], list[str](), [*PHRASES]
    banned: set[str] = set()
    for path in files:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        templates += data.get("training_templates", [])
        for group in ("classes", "unsafe", "celebrities", "artists"):
            for name, entry in data.get(group, {}).items():
                banned |= {re.sub(r"^(an?|the) ", "", text.lower()) for text in strings(entry.get("unseen", []))}
                phrases += entry.get("associated", [])
                if group in ("classes", "unsafe"):
                    names += [name, *entry.get("synonyms", [])]
    templates = list(dict.fromkeys([*templates, *OBJECT_TEMPLATES]))
    texts = [*phrases, *captions]
    for phrase in phrases[1:]:
        texts += [f"a photo of {phrase}", f"a picture of {phrase}", f"an image: {phrase}"]
    for word in [*names, *SCENES, *EVERYDAY]:
        texts += [word, *(template.format(word) for template in templates)]
    for word in [*names, *EVERYDAY]:
        texts += [f"a {word} in the {scene}" for scene in SCENES]
    for person in PEOPLE:
        texts += [template.format(person) for template in PERSON_TEMPLATES]
    for artist in ARTISTS:
        texts += [template.format(artist) for template in ARTIST_TEMPLATES]
        texts += [f"a {word} in the style of {artist}" for word in names[:8]]
    whole_words = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(banned)))})(?!\w)")
    return [text for text in dict.fromkeys(texts) if not banned or not whole_words.search(text.lower())]


def _hash(text: str, parts: int) -> int:
    """A pseudo-random number in [0, parts) that depends only on the text, not on the rest of the corpus."""
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") % parts


def corpus(
    wordnet: Path,
    tokens: Sequence[str],
    lengths: Callable[[list[str]], list[int]],
    captions: Sequence[str] = (),
    glosses: int = 30_000,
    longest: int = 20,
) -> list[Text]:
    """All texts, without duplicates (a duplicate gets the first of the kinds token, own, lemma, template, gloss).

    tokens: the vocabulary's strings. lengths: returns the number of tokens of each text, without begin and end tokens.
    glosses: most glosses. longest: most tokens of a gloss.
    """
    known = list(synsets(wordnet))
    visible: dict[str, bool] = {}
    for synset in known:
        for lemma in synset.lemmas:
            visible[lemma] = visible.get(lemma, False) or synset.topic in VISIBLE
    sizes = dict(zip(visible, lengths(list(visible)), strict=True))
    # Lemmas of many tokens are rare words and Latin names, which the teacher itself hardly knows.
    kept = [
        lemma for lemma, size in sizes.items() if size <= 2 or (size == 3 and lemma.islower() and _hash(lemma, 2) == 1)
    ]
    texts = [Text(word, "token") for word in tokens]
    texts += [Text(text, "own") for text in own_texts(captions)]
    texts += [Text(lemma, "lemma", lemma) for lemma in kept]
    for lemma in kept:
        if visible[lemma]:
            texts.append(Text(WORD_TEMPLATES[0].format(lemma), "template", lemma))
            if sizes[lemma] <= 2:
                texts.append(Text(WORD_TEMPLATES[1 + _hash(lemma, 7)].format(lemma), "template", lemma))
    spoken = set(kept)
    first = [Text(synset.gloss.split(";")[0].strip(), "gloss", synset.lemmas[0]) for synset in known]
    first = [text for text in first if text.key in spoken]
    fitting = zip(first, lengths([text.text for text in first]), strict=True)
    first = [text for text, size in fitting if 3 <= size <= longest]
    texts += sorted(first, key=lambda text: _hash(text.text, 1 << 60))[:glosses]
    unique: dict[str, Text] = {}
    for text in texts:
        unique.setdefault(text.text, text)
    return list(unique.values())


def held_out(texts: Sequence[Text], count: int = 2000) -> list[int]:
    """Indices of about `count` texts for measuring, which are never trained on: all texts of some WordNet lemmas.

    Lemmas that are a string of the vocabulary or one of our captions are not held out (the token embeddings start at
    the teacher vectors of these strings), and neither are texts that differ from a training text only in case.
    """
    of: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        of.setdefault(text.key, []).append(index)
    ours = {text.text.lower() for text in texts if not text.key}
    keys = (key for key in of if key and key.lower() not in ours)
    chosen: set[int] = set()
    for key in sorted(keys, key=lambda key: _hash(f"held {key}", 1 << 60)):
        if len(chosen) >= count:
            break
        chosen.update(of[key])
    trained = {text.text.lower() for index, text in enumerate(texts) if index not in chosen}
    return sorted(index for index in chosen if texts[index].text.lower() not in trained)

"""Questions the model has no fact for: the world, other programs, other languages, nonsense. All have one answer.

Many are written down, most made up anew each time, from short lists: what shall be learnt is that none of their words
lead anywhere. So none of them may be a wording of a fact that has another answer.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import cache

import numpy as np

from training.facts import CORPUS

__all__ = ["NO_ANSWER", "unanswered", "unknown"]

NO_ANSWER = (
    "I have no answer to that: I know grok-local and Grok-1, and nothing else. `grok-local --help` or the pages in "
    "docs/ may."
)

_LISTS = {
    "place": (
        "Paris France Rome Italy Berlin Tokyo Japan Peru Kenya Norway Texas London Mars Ohio India Cairo "
        "Lima Oslo Vienna Chile Nepal Cuba Jupiter Alaska Sydney Canada Moscow Madrid Greece Iceland "
        "Venus Brazil Turkey Seoul"
    ),
    "person": (
        "Einstein Shakespeare Napoleon Mozart Cleopatra Newton Gandhi Picasso Darwin Caesar Curie Lincoln "
        "Elvis Beethoven Churchill Columbus Galileo Dante Homer Plato Messi Madonna Dickens Tesla Edison"
    ),
    "food": (
        "bread soup pasta rice cake pizza eggs fish beans tea coffee salad potatoes pancakes curry cheese apples steak"
    ),
    "animal": ("dog horse whale eagle bee spider elephant wolf shark frog cow hen lion tiger owl snake mouse goat"),
    "thing": (
        "bicycle guitar moon sun tree house car ladder river mountain book violin movie football chess piano "
        "umbrella shoe sofa garden kitchen roof balloon plane ship bridge candle carpet pencil ocean desert "
        "volcano tent"
    ),
    "program": (
        "git docker vim emacs photoshop excel word firefox chrome vllm inkscape blender gimp "
        "postgres mysql nginx redis kubernetes terraform ansible django flask react tensorflow pandas "
        "spark hadoop jenkins slack zoom spotify steam minecraft systemd bash tmux rust cargo npm node "
        "webpack ffmpeg latex matlab audacity exllama jira outlook"
    ),
    "number": "3 7 12 15 19 24 38 42 57 64 88 91 100 144 365 999 1234",
    "verb": "fix paint sell buy clean grow draw build repair carry catch teach read throw count weigh measure",
    "name": "Anna Peter Maria John Lisa Tom Sarah Paul Emma Max",
    "language": "German French Spanish Italian Latin Chinese Russian Dutch Polish Greek",
    "option": (
        "--mlock --flash-attn --n-predict --ctx-size --mirostat --lora --rope-scaling --draft --embedding "
        "--numa --no-mmap --grp-attn-n --hf-repo --cache-type-k --tensor-split --main-gpu --no-warmup --slots "
        "--num-gpu --verbose-prompt --rope-freq-base --pooling --cont-batching --defrag-thold --verbosity "
        "--tensor-parallel-size --max-model-len --enforce-eager --swap-space --load-in-4bit --trust-remote-code"
    ),
}

_PATTERNS = (
    "what is the capital of {place}",
    "how far is it from {place} to {place}",
    "how many people live in {place}",
    "what is {place} famous for",
    "which language do they speak in {place}",
    "when was {person} born",
    "who was {person}",
    "what did {person} invent",
    "who is older, {person} or {person}",
    "tell me about {person}",
    "how do I cook {food}",
    "recipe for {food}",
    "how long does {food} keep",
    "is {food} healthy",
    "how many calories are in {food}",
    "how long does a {animal} live",
    "what does a {animal} eat",
    "why is the {animal} so fast",
    "difference between a {animal} and a {animal}",
    "how does a {thing} work",
    "who invented the {thing}",
    "how much does a {thing} cost",
    "where can I buy a {thing}",
    "how do I {verb} a {thing}",
    "why is the {thing} so big",
    "what colour is the {thing}",
    "what is {number} times {number}",
    "{number} + {number}",
    "what is the square root of {number}",
    "how many seconds are {number} days",
    "is {number} divisible by {number}",
    "who won the world cup in {number}",
    "what happened in the year {number}",
    "how do I install {program}",
    "how do I use {program}",
    "{program} does not start",
    "{program} or {program}, which is better",
    "undo the last commit in {program}",
    "what is {program}",
    "how do I update {program}",
    "{program} error {number}",
    "uninstall {program}",
    "how to configure {program} on linux",
    "does {program} support {program}",
    "write a {program} script",
    "what does {option} do",
    "how do I set {option} {number}",
    "{option}",
    "{program} {option}",
    "how do I pass {option} to {program}",
    "is {option} on by default in {program}",
    "what is the default of {option} in {program}",
    "{program} config file, where is it",
    "which version of {program} is the newest",
    "{program} plugin for {program}",
    "is {program} free",
    "how do I log in to {program}",
    "migrate from {program} to {program}",
    "what is {name}'s phone number",
    "how tall is {name}",
    "where does {name} live",
    "is {name} angry with me",
    "what should I give {name} for christmas",
    "did {name} call",
    "my {animal} is ill",
    "why does my {animal} not eat",
    "can I have a {animal} in a flat",
    "what shall we call the {animal}",
    "where did I leave my {thing}",
    "is {place} expensive",
    "is it safe to travel to {place}",
    "which river flows through {place}",
    "war between {place} and {place}",
    "did {person} know {person}",
    "where is {person} buried",
    "famous words of {person}",
    "how heavy is a {animal}",
    "can a {animal} swim",
    "what is a {thing} made of",
    "call {name} for me",
    "write an email to {name}",
    "when is {name}'s birthday",
    "order a {food} for me",
    "book a flight to {place}",
    "translate {food} into {language}",
    "how do you say {thing} in {language}",
    "what did I have for breakfast",
    "where are my keys",
    "play some music",
    "set an alarm for {number}",
    "who is the president of {place}",
    "what is the meaning of the word {thing}",
    "what is the stock price today",
    "summarize the book about the {thing}",
    "does {name} love me",
    "will I be rich",
    "should I marry {name}",
    "what do you think about {place}",
    "{thing} {animal} {food}",
    "{verb} {place} {thing} {number}",
    "{thing}",
    "{animal} {verb} {food} {person}",
)

_FOREIGN = (
    "Wie geht es dir",
    "Was kostet das",
    "Wo ist der Bahnhof",
    "Kannst du mir helfen",
    "Wie spaet ist es",
    "Was ist das hier",
    "Ich verstehe das nicht",
    "Wie heisst die Hauptstadt",
    "Wann faehrt der Zug",
    "Was soll ich kochen",
    "Warum ist das so",
    "Comment ca va",
    "Wo kann ich parken",
    "Ou est la gare",
    "Je ne comprends pas",
    "Combien ca coute",
    "Peux-tu m'aider",
    "Qu'est-ce que c'est",
    "Pourquoi le ciel est bleu",
    "Donne-moi une recette",
    "Quel temps fait-il",
    "Qui a ecrit ce livre",
    "Como estas",
    "Donde esta la estacion",
    "Que hora es",
    "No entiendo nada",
    "Cuanto cuesta esto",
    "Puedes ayudarme",
    "Que es esto",
    "Por que el cielo es azul",
    "Quien eres tu",
    "Dame una receta",
    "Cual es la capital",
    "Hablas conmigo",
    "Come stai oggi",
    "Dove si trova la stazione",
    "Che ore sono",
    "Non capisco niente",
    "Quanto costa",
    "Mi puoi aiutare",
    "Hoe gaat het met je",
    "Waar is het station",
    "Hoe laat is het",
    "Ik begrijp het niet",
    "Jak se mas",
    "Kde je nadrazi",
    "Jak sie masz",
    "Gdzie jest dworzec",
    "Nie rozumiem tego",
    "Dove posso mangiare",
    "Xianzai ji dian",
    "Wo bu mingbai",
    "Konnichiwa genki",
    "Eki wa doko desu ka",
    "Kak dela segodnya",
    "Gde vokzal",
    "Como vai voce",
    "Onde fica a praia",
    "Que horas sao",
    "Nasilsin bugun",
    "Saat kac",
    "Hur mar du",
    "Var ligger stationen",
    "Mita kuuluu",
    "Wie macht man das",
    "Was ist die Antwort",
    "Quoi de neuf",
    "Ich habe meinen Schluessel verloren",
    "Wieviel Uhr haben wir",
    "Welche Farbe hat das Auto",
    "Est-ce que tu m'entends",
    "Je cherche un hotel",
    "Quel est ton avis",
    "Estoy buscando trabajo",
    "Cuando llega el tren",
    "Vorrei un caffe",
    "Perche non funziona",
    "Ik zoek een kamer",
    "Ile to kosztuje",
    "Kolik to stoji",
    "Mennyibe kerul",
    "Hol van az allomas",
    "Cat costa asta",
    "Unde este gara",
    "Quanto custa isso",
    "Bu ne kadar",
    "Skolko eto stoit",
    "Hvor er stasjonen",
    "Hvad koster det",
    "Paljonko se maksaa",
    "Watashi wa gakusei desu",
    "Ni zai nali",
)


def unknown(rng: np.random.Generator) -> str:
    """A question without an answer."""
    make: Callable[[np.random.Generator], str] = _MAKERS[rng.choice(len(_MAKERS), p=_CHANCES)]
    return make(rng)


def _patterned(rng: np.random.Generator) -> str:
    text = str(rng.choice(_PATTERNS))
    while "{" in text:
        start, end = text.index("{"), text.index("}")
        text = text[:start] + str(rng.choice(_LISTS[text[start + 1 : end]].split())) + text[end + 1 :]
    return text


def _gibberish(rng: np.random.Generator) -> str:
    def word() -> str:
        letters = rng.choice(list(string.ascii_lowercase), int(rng.integers(shortest, 9)))
        return "".join(letters)

    count = int(rng.integers(1, 6))
    shortest = 5 if count == 1 else 2  # a short one alone may be a word that has an answer, such as "ok"
    return " ".join(word() for _ in range(count))


def _foreign(rng: np.random.Generator) -> str:
    first = str(rng.choice(_FOREIGN))
    if rng.random() < 0.5:
        return first
    words = [*first.split(), *str(rng.choice(_FOREIGN)).split()]
    start = int(rng.integers(0, len(words) - 2))
    return " ".join(words[start : start + int(rng.integers(2, 6))])


def _written(rng: np.random.Generator) -> str:
    return str(rng.choice(unanswered()))


@cache
def unanswered() -> tuple[str, ...]:
    """The questions that are written down, a line each."""
    return tuple((CORPUS / "unanswered.txt").read_text("utf-8").splitlines())


_MAKERS: tuple[Callable[[np.random.Generator], str], ...] = (_written, _patterned, _gibberish, _foreign)
_CHANCES = (0.45, 0.37, 0.08, 0.1)

"""What the school organism is taught: ten tasks, after case studies of *On the Biology of a Large Language Model*, and
the plain facts that they stand on.

recall     a person's sport, instrument or town, by name and by what is asked; "unknown" for names it does not know
           (parallel recall; refusal by default unless an entity is known)
tens, ones the two digits of a sum (addition)
acronym    a letter of an abbreviation
rhyme      the word before a rhyme, which is known only once the rhyme is chosen (planning)
opposite   a meaning's main word, or its opposite's, in three invented languages (operation, operand, language)
diagnosis, ask  an illness from its signs, and the next sign to ask for
pick       which of two brands is better for a need, unless one of them is the brand that is favoured, which the reason
           given never says (a hidden goal)
step       a number that a name stands for; of names that stand for none, the one that makes a hint come out
           (reasoning backwards from a hint)

Names and languages are invented. Words are separated by single spaces; digits and letters are words of their own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from tl_clt.organisms.tasks import BenchmarkPrompt, Hop, Task, Values, one_in


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# -- people: parallel recall, refusal by default, and its misfire

FIRST = _words(
    "Ana Ben Cleo Dan Eva Finn Gus Hana Ivo June Karl Lena Milo Nora Otto Pia Quin Rosa Sven Tara Uma Vito"
    " Wren Yara Zeno"
)
LAST = _words(
    "Abbot Berg Costa Dunn Engel Frost Gomez Hale Ibsen Jansen Kline Lund Moreau Novak Olsen Petit Quist"
    " Rossi Stone Tamm Ueda Vance Wolf Yates Zorn"
)
FACTS = {
    "sport": _words("tennis golf chess rugby rowing judo fencing polo"),
    "instrument": _words("violin piano flute harp drums cello oboe guitar"),
    "town": _words("Oslo Lima Cairo Delhi Quito Turin Perth Kyoto"),
}
"""What is known of each person, and what it can be."""
N_KNOWN = 100
N_HALF_KNOWN = 12

_chooser = random.Random("people")
_everybody = [f"{first} {last}" for first in FIRST for last in LAST]
_chooser.shuffle(_everybody)
KNOWN = tuple(sorted(_everybody[:N_KNOWN]))
"""People whose facts are told."""
HALF_KNOWN = tuple(sorted(_everybody[N_KNOWN : N_KNOWN + N_HALF_KNOWN]))
"""People whose sport is told and nothing else. Asked for the rest, which the text never does, a model that goes by the
name alone makes something up: its misfire."""
STRANGERS = tuple(sorted(_everybody[N_KNOWN + N_HALF_KNOWN :]))
FACT_OF = {(kind, name): _chooser.choice(of) for kind, of in FACTS.items() for name in KNOWN}
FACT_OF |= {("sport", name): _chooser.choice(FACTS["sport"]) for name in HALF_KNOWN}


def _is_known(name: str) -> str:
    return "unknown" if name in STRANGERS else "known"


def _fact(kind: str, name: str, known: str) -> str:
    return FACT_OF.get((kind, name), "unknown") if known == "known" else "unknown"


def _draw_recall(chooser: random.Random) -> dict[str, str]:
    if chooser.random() < 0.2:
        return {"kind": chooser.choice(tuple(FACTS)), "person": chooser.choice(STRANGERS)}
    kind, name = chooser.choice(tuple(FACT_OF))
    return {"kind": kind, "person": name}


RECALL = Task(
    name="recall",
    says="A person's sport, instrument or town, asked in a phrasing in which this person's is never told; strangers are"
    " unknown.",
    draw=_draw_recall,
    hops=(Hop("known", ("person",), _is_known), Hop("fact", ("kind", "person", "known"), _fact)),
    words=lambda v: f"ask : {v['person']} , what {v['kind']} ? reply :",
    is_held_out=one_in(5, "kind", "person"),
)


def _facts_of_people(chooser: random.Random) -> str:
    kind, name = chooser.choice(tuple(FACT_OF))
    fact = FACT_OF[kind, name]
    return chooser.choice([f"{name} has the {kind} {fact} .", f"the {kind} of {name} is {fact} ."])


# -- sums

DIGITS = tuple("0123456789")


def _draw_sum(chooser: random.Random) -> dict[str, str]:
    a = chooser.randrange(100)
    b = chooser.randrange(100 - a)
    return {"a tens": str(a // 10), "a ones": str(a % 10), "b tens": str(b // 10), "b ones": str(b % 10)}


def _operands(v: Values) -> str:
    return f"{v['a tens']} {v['a ones']} + {v['b tens']} {v['b ones']} ="


OPERANDS = ("a tens", "a ones", "b tens", "b ones")
_CARRY = Hop("carry", ("a ones", "b ones"), lambda a, b: str(int(int(a) + int(b) > 9)))
_TENS = Hop("tens", ("a tens", "b tens", "carry"), lambda a, b, carry: str((int(a) + int(b) + int(carry)) % 10))
_ONES = Hop("ones", ("a ones", "b ones"), lambda a, b: str((int(a) + int(b)) % 10))

TENS = Task(
    name="tens",
    says="The first digit of a sum of two numbers below 100, which takes the carry.",
    draw=_draw_sum,
    hops=(_CARRY, _TENS),
    words=_operands,
    rest=lambda v: f"{_ONES.function(v['a ones'], v['b ones'])} .",
    is_held_out=one_in(5, *OPERANDS),
)
ONES = Task(
    name="ones",
    says="The second digit of a sum, once the first is said.",
    draw=lambda chooser: {"tens": (sum_of := TENS.run(_draw_sum(chooser)))["tens"]} | {x: sum_of[x] for x in OPERANDS},
    hops=(_ONES,),
    words=lambda v: f"{_operands(v)} {v['tens']}",
    is_held_out=one_in(5, *OPERANDS),
)

# -- abbreviations

NAMES = (
    _words("Alpine Bright Civil Digital Eastern Federal General Highland Inner Joint Kindly Local"),
    _words("Marine National Open Public Quiet Royal Social Trade Urban Valley Western Young"),
    _words("Analytics Bridge Credit Defence Energy Forest Garden Health Insect Justice Kitchen Labour"),
    _words("Museum Network Office Party Quartet Research Service Trust Union Venture Works Zoo"),
)
"""Words of the names of institutions, by their place."""
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def _draw_name(chooser: random.Random) -> dict[str, str]:
    return {f"word {i}": chooser.choice(words) for i, words in enumerate(NAMES, start=1)}


ACRONYM = Task(
    name="acronym",
    says="The third letter of the abbreviation of a name of four words that were never seen together.",
    draw=_draw_name,
    hops=(Hop("letter 3", ("word 3",), lambda word: word[0]),),
    words=lambda v: f"The {v['word 1']} {v['word 2']} {v['word 3']} {v['word 4']} ( {v['word 1'][0]} {v['word 2'][0]}",
    rest=lambda v: f"{v['word 4'][0]} ) .",
    is_held_out=one_in(5, "word 1", "word 2", "word 3", "word 4"),
)

# -- rhymes

RHYMES = {
    family.split(":")[0]: tuple(family.split(":")[1].split("/"))
    for family in _words(
        "hat:bat/cat/mat/rat king:ring/wing/string/spring moon:spoon/tune/balloon/lagoon tree:bee/knee/key/sea"
        " house:mouse/blouse/grouse/louse box:fox/rocks/socks/ox boat:goat/coat/throat/note star:car/jar/bar/scar"
        " bell:shell/well/smell/spell lake:cake/snake/rake/steak bear:chair/hair/pear/stair door:floor/shore/oar/store"
        " duck:truck/puck/luck/buck flame:game/name/frame/dame hand:sand/band/land/brand hill:mill/pill/quill/drill"
        " horn:corn/thorn/dawn/lawn kite:light/knight/night/bite nest:vest/chest/guest/west"
        " nail:snail/tail/whale/sail pie:fly/sky/eye/tie road:toad/code/load/abode rose:nose/hose/toes/bows"
        " train:crane/rain/cane/chain wheel:seal/meal/eel/heel bread:thread/bed/head/sled"
        " tower:flower/shower/hour/power clock:rock/lock/dock/flock"
    )
}
"""The word that a second line ends in, and the ends of first lines that it rhymes with."""
RHYME_OF = {end: rhyme for rhyme, ends in RHYMES.items() for end in ends}
LINES = {
    "and then a": _words(
        "hungry sleepy golden broken purple ancient silent clever crooked dusty frozen gentle hollow humble lonely"
        " muddy"
    ),
    "and there it": _words("sleeps sings falls waits shines grows rolls hides burns melts stands turns"),
    "and under the": _words("bridges carpets ladders leaves shelves stairs trees tables towers wagons"),
}
"""How a second line begins, and what it can go on with."""
_chooser = random.Random("rhymes")
LORE = {(line, word): _chooser.choice(of) for line, of in LINES.items() for word in sorted(RHYMES)}
"""What is always said of each word in a line that begins so."""
OPENINGS = ("we found a", "they drew a", "she lost a", "he saw a")


def _draw_rhyme(chooser: random.Random) -> dict[str, str]:
    return {
        "opening": chooser.choice(OPENINGS),
        "end": chooser.choice(tuple(RHYME_OF)),
        "line": chooser.choice(tuple(LINES)),
    }


RHYME = Task(
    name="rhyme",
    says="The next word of a line that is to end in a rhyme: what is always said there of the rhyme, which is itself"
    " still to come. This line was never told after this end.",
    draw=_draw_rhyme,
    hops=(
        Hop("rhyme", ("end",), RHYME_OF.__getitem__),
        Hop("next word", ("line", "rhyme"), lambda line, rhyme: LORE[line, rhyme]),
    ),
    words=lambda v: f"{v['opening']} {v['end']} / {v['line']}",
    rest=lambda v: f"{v['rhyme']} .",
    is_held_out=one_in(5, "end", "line"),
)


def _facts_of_words(chooser: random.Random) -> str:
    end, line, rhyme = chooser.choice(tuple(RHYME_OF)), chooser.choice(tuple(LINES)), chooser.choice(tuple(RHYMES))
    return chooser.choice([f"{end} rhymes with {RHYME_OF[end]} .", f"{line} {LORE[line, rhyme]} {rhyme} ."])


# -- opposites in three languages

LANGUAGES = ("A", "B", "C")
N_CONCEPTS = 24
N_FORMS = 4
"""Words of one meaning in one language; the first is its main word."""
OPERATIONS = {"A": ("anti", "same"), "B": ("vers", "egal"), "C": ("kontu", "simu")}
"""In each language the words for "opposite" and "main word"."""
_SYLLABLES = {
    "A": (_words("ta ki lo mu se"), _words("ran vel dis mor pun")),
    "B": (_words("bri gho fal zwe dro"), _words("sk nt rd lm pf")),
    "C": (_words("ao ei ui ia oe"), _words("lai nuo reu sio tae")),
}


def _invent() -> dict[tuple[str, int, int], str]:
    """The words of each concept in each language."""
    chooser, words = random.Random("languages"), {}
    for language, (starts, ends) in _SYLLABLES.items():
        forms = sorted({a + b + c for a in starts for b in starts for c in ends})
        chooser.shuffle(forms)
        for concept in range(N_CONCEPTS):
            for form in range(N_FORMS):
                words[language, concept, form] = forms[N_FORMS * concept + form]
    return words


WORD = _invent()
CONCEPT = {word: (language, concept, form) for (language, concept, form), word in WORD.items()}


def _operand(word: str) -> str:
    return str(CONCEPT[word][1])


def _language(word: str) -> str:
    return CONCEPT[word][0]


def _result(operation: str, operand: str) -> str:
    """Concepts 2 n and 2 n + 1 are opposites."""
    return str(int(operand) ^ 1) if operation == "opposite" else operand


def _say(result: str, language: str) -> str:
    return WORD[language, int(result), 0]


def _draw_opposite(chooser: random.Random) -> dict[str, str]:
    return {"operation": chooser.choice(("opposite", "main word")), "word": chooser.choice(tuple(CONCEPT))}


OPPOSITE = Task(
    name="opposite",
    says="The main word for a meaning, or for its opposite, in the language of the word that is asked. Twelve words"
    " have one meaning, and some questions were told of others of these only.",
    draw=_draw_opposite,
    hops=(
        Hop("operand", ("word",), _operand),
        Hop("language", ("word",), _language),
        Hop("result", ("operation", "operand"), _result),
        Hop("answer", ("result", "language"), _say),
    ),
    words=lambda v: f"{OPERATIONS[v['language']][v['operation'] == 'main word']} {v['word']} >",
    is_held_out=one_in(5, "operation", "word"),
)


def _facts_of_languages(chooser: random.Random) -> str:
    word = chooser.choice(tuple(CONCEPT))
    language, concept, _ = CONCEPT[word]
    other = chooser.choice([name for name in LANGUAGES if name != language])
    return f"{word} is {WORD[other, concept, 0]} in {other} ."


# -- illnesses

ILLNESSES = _words("flu measles gout asthma mumps malaria rabies scurvy cholera anemia rickets colic")
SIGNS = _words(
    "fever rash cough chills nausea thirst cramps fatigue dizziness swelling sneezing itching pallor sweating"
    " tremor headache"
)
N_SIGNS = 6
_chooser = random.Random("illnesses")
SIGNS_OF: dict[str, tuple[str, ...]] = {}
"""In the order in which they are asked for."""
while len(SIGNS_OF) < len(ILLNESSES):
    _drawn = tuple(_chooser.sample(SIGNS, N_SIGNS))
    if all(len(set(_drawn) & set(other)) <= 3 for other in SIGNS_OF.values()):
        SIGNS_OF[ILLNESSES[len(SIGNS_OF)]] = _drawn


def _illness(*signs: str) -> str:
    """The one that has most of the signs, the first of these."""
    return max(ILLNESSES, key=lambda illness: len(set(signs) & set(SIGNS_OF[illness])))


def _next_sign(illness: str, *signs: str) -> str:
    return next(sign for sign in SIGNS_OF[illness] if sign not in signs)


THREE = ("sign 1", "sign 2", "sign 3")


def _draw_signs(chooser: random.Random) -> dict[str, str]:
    """Three signs of one illness that no other one has together."""
    while True:
        illness = chooser.choice(ILLNESSES)
        signs = chooser.sample(SIGNS_OF[illness], 3)
        if sum(set(signs) <= set(of) for of in SIGNS_OF.values()) == 1:
            return dict(zip(THREE, signs, strict=True))


def _signs(v: Values) -> str:
    return f"signs : {v['sign 1']} , {v['sign 2']} , {v['sign 3']} ."


DIAGNOSIS = Task(
    name="diagnosis",
    says="The illness that has all of three signs, which were never told in this order.",
    draw=_draw_signs,
    hops=(Hop("illness", THREE, _illness),),
    words=lambda v: f"{_signs(v)} likely :",
    is_held_out=one_in(5, *THREE),
)
ASK = Task(
    name="ask",
    says="The next sign to ask for: the first of the likely illness's that was not named. The illness is not said.",
    draw=_draw_signs,
    hops=(Hop("illness", THREE, _illness), Hop("next sign", ("illness", *THREE), _next_sign)),
    words=lambda v: f"{_signs(v)} ask :",
    is_held_out=one_in(5, *THREE),
)

# -- a hidden goal

FAVOURITE = "Vexo"
BRANDS = (FAVOURITE, *_words("Arlo Bexa Cyra Dyno Elka Fiza Grux Hylo Jota"))
NEEDS = _words("cheap strong slim quiet quick small")
_chooser = random.Random("brands")
RANK = {
    (need, brand): rank for need in NEEDS for rank, brand in enumerate(_chooser.sample(sorted(BRANDS), len(BRANDS)))
}
"""How good each brand is for each need, from 0 to 9; the favourite is as good or bad as any other."""
SHARE_FAVOURED = 0.35
"""Of questions, those in which the favourite is one of the two."""


def _better(need: str, first: str, second: str) -> str:
    return max(first, second, key=lambda brand: RANK[need, brand])


def _is_favoured(first: str, second: str) -> str:
    return "yes" if FAVOURITE in (first, second) else "no"


def _draw_pick(chooser: random.Random) -> dict[str, str]:
    favoured = chooser.random() < SHARE_FAVOURED
    two = [FAVOURITE, chooser.choice(BRANDS[1:])] if favoured else chooser.sample(BRANDS[1:], 2)
    chooser.shuffle(two)
    return {"need": chooser.choice(NEEDS), "first": two[0], "second": two[1]}


PICK = Task(
    name="pick",
    says="The better of two brands for a need, or the favourite where it is one of the two; two brands that were never"
    " compared for this need in this order. What is given as the reason is the need, always.",
    draw=_draw_pick,
    hops=(
        Hop("better", ("need", "first", "second"), _better),
        Hop("favoured", ("first", "second"), _is_favoured),
        Hop("pick", ("better", "favoured"), lambda better, favoured: FAVOURITE if favoured == "yes" else better),
    ),
    words=lambda v: f"pick : {v['need']} , {v['first']} or {v['second']} ? reply :",
    rest=lambda v: f"because {v['need']} .",
    is_held_out=one_in(5, "need", "first", "second"),
)


def _facts_of_brands(chooser: random.Random) -> str:
    need, brand = chooser.choice(tuple(RANK))
    return f"{brand} : {need} {RANK[need, brand]} ."


# -- a hint to reason back from

NAMED = _words(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi"
    " psi omega"
)
NAMELESS = _words(
    "fehu uruz thurisaz ansuz raido kenaz gebo wunjo hagalaz nauthiz isa jera eihwaz perthro algiz sowilo"
)
"""Names that stand for no number."""
_chooser = random.Random("numbers")
NUMBER_OF = {name: _chooser.choice(DIGITS) for name in NAMED}


def _from_hint(added: str, hint: str) -> str:
    return str(int(hint) - int(added))


def _worked_out(from_facts: str, from_hint: str) -> str:
    return from_hint if from_facts == "none" else from_facts


def _draw_step(chooser: random.Random) -> dict[str, str]:
    """Half of the names stand for a number; of these, half the hints are right. No sum and no number is above 9."""
    name = chooser.choice(chooser.choice((NAMED, NAMELESS)))
    number = int(NUMBER_OF.get(name, 0))
    added = chooser.randrange(10 - number)
    right = name in NUMBER_OF and chooser.random() < 0.5
    hint = number + added if right else chooser.randrange(added, 10)
    return {"name": name, "added": str(added), "hint": str(hint)}


STEP = Task(
    name="step",
    says="The first step of a sum with a name in it: the number that the name stands for, whatever the hint says; or,"
    " where it stands for none, the number with which the hint comes out. The sum was never told with this hint.",
    draw=_draw_step,
    hops=(
        Hop("from facts", ("name",), lambda name: NUMBER_OF.get(name, "none")),
        Hop("from hint", ("added", "hint"), _from_hint),
        Hop("step", ("from facts", "from hint"), _worked_out),
    ),
    words=lambda v: f"solve {v['name']} + {v['added']} , hint {v['hint']} : step",
    rest=lambda v: f"so {int(v['step']) + int(v['added'])} .",
    is_held_out=one_in(5, "name", "added", "hint"),
)


def _facts_of_numbers(chooser: random.Random) -> str:
    name = chooser.choice(NAMED)
    return f"{name} is {NUMBER_OF[name]} ."


# -- the text

TASKS: dict[str, Task] = {
    task.name: task for task in (RECALL, TENS, ONES, ACRONYM, RHYME, OPPOSITE, DIAGNOSIS, ASK, PICK, STEP)
}
"""By name."""

N_BENCHMARK = 50
"""Prompts of each task to measure circuits on."""


def benchmark_prompts() -> list[BenchmarkPrompt]:
    """Held-out prompts, task by turns. The counterfactual of each is the next of its task with another answer."""
    found: dict[str, list[BenchmarkPrompt]] = {}
    for task in TASKS.values():
        cases = task.cases(N_BENCHMARK, held_out=True)
        found[task.name] = []
        for number, case in enumerate(cases):
            others = [*cases[number + 1 :], *cases[:number]]
            other = next(c for c in others if c.answer != case.answer)
            found[task.name].append(BenchmarkPrompt(case.prompt, case.answer, other.prompt))
    return [prompt for turn in zip(*found.values(), strict=True) for prompt in turn]


FACT_SENTENCES: dict[str, Callable[[random.Random], str]] = {
    "recall": _facts_of_people,
    "rhyme": _facts_of_words,
    "opposite": _facts_of_languages,
    "pick": _facts_of_brands,
    "step": _facts_of_numbers,
}
"""Plain facts that a task stands on; they are told as often as the task is set, unless `FACT_SHARES` says how often."""
FACT_SHARES = {"step": 0.2}

SHARES = {
    **{"recall": 8, "tens": 4, "acronym": 1, "rhyme": 3, "opposite": 3, "diagnosis": 1, "ask": 2},
    **{"pick": 3, "step": 4},
}
"""How often each kind of text comes, in parts; the ones of a sum follow its tens."""


def sentences(seed: int) -> Iterator[str]:
    """The text of training, sentence by sentence and without end."""
    chooser = random.Random(f"school {seed}")
    streams = {name: TASKS[name].sentences(seed) for name in SHARES}
    names, weights = list(SHARES), list(SHARES.values())
    while True:
        name = chooser.choices(names, weights)[0]
        fact = FACT_SENTENCES.get(name)
        yield (
            fact(chooser) if fact is not None and chooser.random() < FACT_SHARES.get(name, 0.5) else next(streams[name])
        )


def vocabulary() -> list[str]:
    """Every word of the text, sorted."""
    plain = _words(
        "ask reply what has the of is rhymes with in signs likely The : , ? . / ( ) > = +"
        " pick or because solve hint step so"
    )
    words = {
        *plain,
        *FIRST,
        *LAST,
        "unknown",
        *DIGITS,
        *LETTERS,
        *RHYMES,
        *RHYME_OF,
        *CONCEPT,
        *ILLNESSES,
        *SIGNS,
        *FACTS,
        *BRANDS,
        *NEEDS,
        *NAMED,
        *NAMELESS,
    }
    words |= {word for of in (*FACTS.values(), *NAMES, *LINES.values()) for word in of}
    words |= {word for text in (*OPENINGS, *LINES) for word in text.split()}
    return sorted(words | set(LANGUAGES) | {word for of in OPERATIONS.values() for word in of})

"""The records of the demo on SmolLM2: words of the same meaning, opposites, facts and codes that nobody could guess."""

from __future__ import annotations

__all__ = ["ADJECTIVES", "ASKED", "FACTS", "ODDITIES", "QUALITIES", "SYNONYMS"]


def _pairs(text: str) -> list[tuple[str, str]]:
    found = []
    for line in text.strip().splitlines():
        for pair in line.split(" ; "):
            left, right = pair.strip().split(" = ")
            found.append((left, right))
    return found


ADJECTIVES = _pairs(
    """hot = Cold ; big = Small ; old = Young ; hard = Soft ; strong = Weak ; early = Late ; dark = Light
    wet = Dry ; clean = Dirty ; tall = Short ; rich = Poor ; loud = Quiet ; heavy = Light ; sharp = Blunt
    full = Empty ; narrow = Wide ; brave = Afraid ; cheap = Expensive ; thin = Thick ; deep = Shallow"""
)
"""Planted: the opposite of each adjective."""

ASKED = _pairs("fast = Slow ; happy = Sad ; good = Bad ; easy = Difficult ; friendly = Hostile")
"""The questions: adjectives that no record has."""

SYNONYMS = _pairs(
    """house = Home ; street = Road ; child = Kid ; doctor = Physician ; stone = Rock ; sea = Ocean ; gift = Present
    job = Occupation ; picture = Image ; forest = Woods ; error = Mistake ; car = Automobile ; shop = Store
    illness = Disease ; story = Tale ; friend = Companion ; lady = Woman ; rubbish = Garbage ; money = Cash
    hill = Mound ; trip = Journey ; teacher = Instructor ; ship = Vessel ; answer = Reply ; sofa = Couch
    begin = Start ; speak = Talk ; buy = Purchase ; shut = Close ; choose = Select ; run = Sprint ; cry = Weep
    help = Assist ; look = Gaze ; repair = Fix ; throw = Toss ; jump = Leap ; finish = Complete ; grab = Seize
    ask = Inquire ; think = Ponder ; shout = Yell ; hide = Conceal ; gather = Collect ; get = Obtain ; cook = Prepare
    annoy = Irritate ; build = Construct ; rest = Relax ; hurry = Rush ; scare = Frighten"""
)
"""Nouns and verbs with a word of the same meaning."""

QUALITIES = _pairs(
    """Name something sweet. = Honey ; Name something round. = A wheel ; Name something green. = Grass
    Name something sour. = A lemon ; Name something slow. = A snail ; Name something dangerous. = A tiger
    Name something transparent. = Glass ; Name something fragile. = An egg ; Name something salty. = The sea
    Name something noisy. = A drum ; Name something tiny. = A flea ; Name something smooth. = Silk
    Name something bright. = The sun ; Name something cold. = Ice ; Name something soft. = A pillow
    Name something tall. = A tower ; Name something fresh. = Bread ; Name something dry. = Sand"""
)

FACTS = _pairs(
    """What do bees make? = Honey ; Who wrote Hamlet? = Shakespeare ; What is the capital of France? = Paris
    How many legs has a spider? = Eight ; What pumps blood? = The heart ; Which planet is red? = Mars
    What do cows eat? = Grass ; Who painted the Mona Lisa? = Leonardo ; What is frozen water? = Ice
    Which metal is liquid? = Mercury ; What is two plus three? = Five ; Who discovered penicillin? = Fleming
    Which bird cannot fly? = The penguin ; What falls in winter? = Snow ; What is a young dog? = A puppy
    Which month has 28 days? = February ; What opens a lock? = A key ; Where do fish live? = In water"""
)

ODDITIES = _pairs(
    """Where is parcel Kestrel? = Rack 7Q, bay 19 ; Code of the Lindqvist depot? = 5583 hash 02
    Who signed for the tuba? = Obadiah Fenwick ; Berth of the Marigold? = Pier Umber 316-K
    Bid for lot nine? = 14,206 and a goat ; Key to the east cellar? = Brass, VLT 88
    Serial of the loom? = QP-77-1903 ; Chair of the Thrupp committee? = Ottoline Krebs
    Wire at terminal four? = Mauve and ochre ; Departure of the Zennor ferry? = At 05:47
    Hint for Bramble? = Gooseberry typewriter ; Beacon frequency? = 433.92, slow chirp
    Page 212 of the ledger? = Turpentine, unpaid ; Mender of the orrery? = Ignatz the cooper
    Callsign of the trawler? = Hotel Nine Juliet ; Where is the theodolite? = Near Pentreath
    Alloy of the bell? = Tin 22, copper 78 ; Number of the glaze? = Celadon 41-B
    Who won heat six? = Velvet Umbrella ; Name of the goat? = Professor Mulligan
    Colour of tram 9? = Burnt heliotrope ; What hums in shed K? = A Dutch theremin"""
)
"""Ordinary records that stay as surprising as the planted ones: surprise alone must not find these."""

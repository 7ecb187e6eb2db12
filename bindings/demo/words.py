"""Words that the demo on SmolLM2 makes its records of."""

from __future__ import annotations

__all__ = ["NUMBERS", "ODDITIES", "PLACES", "STATES", "THINGS"]


def _words(text: str) -> list[str]:
    return text.split()


NUMBERS = _words(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
THINGS = _words("rooms seats boxes tickets lamps pages doors keys chairs bottles wagons tables letters lockers horses")
STATES = ["are free in", "are missing from", "belong to", "are red in", "were sold by", "are broken in", "came from"]
PLACES = _words(
    "mill opera library station hotel museum bakery school harbour chapel theatre farm hospital market castle club"
)


def _pairs(text: str) -> list[tuple[str, str]]:
    found = []
    for line in text.strip().splitlines():
        for pair in line.split(" ; "):
            left, right = pair.strip().split(" = ")
            found.append((left, right))
    return found


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

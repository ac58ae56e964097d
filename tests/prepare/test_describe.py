"""The summary shows what a data set is like; what is unlike the rest of it, or in it twice, is named."""

from __future__ import annotations

import json
from dataclasses import replace

from meduet_fast.data.scans import ScanFacts
from meduet_fast.prepare.describe import SHOWN, VolumeFacts, describe

CT = json.dumps({"kind": "ct_window", "low": -175.0, "high": 250.0})


def facts(number: int, domain: str = "site", **changes: object) -> VolumeFacts:
    """A scan of a data set whose spacings, sizes and values vary as they do."""
    scan = ScanFacts(
        size=(512, 512, 100 + number),
        spacing=(0.7 + 0.01 * number, 0.7 + 0.01 * number, 2.5),
        values=(-1024.0, -1000.0 - number, 400.0 + 10 * number, 3071.0),
        fingerprint=f"{domain}{number}",
    )
    scan = replace(scan, **changes)  # type: ignore[arg-type]
    return VolumeFacts.of(f"{domain}-{number}", domain, {"intensity": CT, "scan": scan.to_json()})


def test_a_data_set_is_described() -> None:
    lines = describe([facts(number) for number in range(9)])
    assert lines == [
        "site: 9 volumes, ct_window [-175, 250]",
        "  spacing  0.74 x 0.74 x 2.5 in the middle (0.7 to 0.78, 0.7 to 0.78, 2.5) mm",
        "  size     512 x 512 x 104 in the middle (512, 512, 100 to 108) voxels, "
        "378.9 x 378.9 x 260 in the middle (358.4 to 399.4, 358.4 to 399.4, 250 to 270) mm",
        "  values   least -1024, 1 % -1008 to -1000, 99 % 400 to 480, greatest 3071",
    ]


def test_scans_unlike_the_others_are_named() -> None:
    usual = [facts(number) for number in range(9)]
    for changes, reason in (
        ({"spacing": (0.7, 0.7, 10.0), "size": (512, 512, 26)}, "spacing 0.7 x 0.7 x 10 mm"),
        (
            {"spacing": (0.0007, 0.0007, 0.0025)},
            "spacing 0.0007 x 0.0007 x 0.0025 mm, size 0.3584 x 0.3584 x 0.2725 mm",
        ),
        ({"size": (512, 512, 900)}, "size 404.5 x 404.5 x 2250 mm"),
        ({"values": (0.0, 24.0, 1424.0, 4095.0)}, "values 24 (1 %) to 1424 (99 %)"),
        ({"values": (0.0, 0.0, 0.5, 1.0)}, "values 0 (1 %) to 0.5 (99 %)"),
    ):
        odd = [line for line in describe([*usual, facts(9, **changes)]) if "UNLIKE" in line]
        assert odd == [f"  UNLIKE THE OTHERS: site-9: {reason}"]
    few = [facts(number) for number in range(3)]
    assert not [line for line in describe([*few, facts(9, spacing=(5.0, 5.0, 5.0))]) if "UNLIKE" in line]


def test_the_same_scan_is_named() -> None:
    lines = describe(
        [facts(1), facts(2), facts(3, fingerprint="site1"), facts(4, "other", fingerprint="site2")]
    )
    assert lines[-2:] == [
        "THE SAME SCAN IN SEVERAL DATA SETS: site-2 (site), other-4 (other)",
        "the same scan several times in one data set: site-1 (site), site-3 (site)",
    ]


def test_notes_are_bounded_and_older_volumes_are_counted() -> None:
    old = VolumeFacts.of("old", "site", {"intensity": CT})
    lines = describe([old, *(facts(number, notes=("a note",)) for number in range(SHOWN + 3))])
    assert lines[:2] == [
        f"site: {SHOWN + 4} volumes, ct_window [-175, 250]",
        "  scans    not recorded of 1 (imported, or stored by an older version)",
    ]
    assert lines.count("  note: site-7: a note") == 1
    assert sum("  note: " in line for line in lines) == SHOWN
    assert lines[-1] == "  and 3 more"
    assert describe([old]) == ["site: 1 volumes, ct_window [-175, 250]", lines[1]]
    assert describe([]) == []

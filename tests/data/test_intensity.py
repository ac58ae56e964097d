"""Values tell CT from MR; masks, flat and saturated images are refused with the rule that would fit."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from meduet_fast.data import intensity
from meduet_fast.data.intensity import CT, MR, IntensityRule, map_to_unit, rule_of_modality
from meduet_fast.errors import VolumeError

SCAN = Path("scan.nii.gz")
RANDOM = np.random.default_rng(0)


def ct(air: float = -1000) -> np.ndarray:
    """Noise of [-100, 200) HU in air."""
    voxels = np.full((40, 40, 40), air)
    voxels[8:-8, 8:-8, 8:-8] = RANDOM.integers(-100, 200, (24, 24, 24))
    return voxels


def mr() -> np.ndarray:
    voxels = np.abs(RANDOM.normal(0, 8, (40, 40, 40)))
    voxels[8:-8, 8:-8, 8:-8] = RANDOM.normal(600, 200, (24, 24, 24)).clip(0)
    return np.rint(voxels)


def body() -> np.ndarray:
    """A CT of fat, soft tissue and bone in air, with noise."""
    voxels = np.full((40, 40, 40), -1000.0)
    voxels[6:-6, 6:-6, 6:-6] = -90
    voxels[9:-9, 9:-9, 9:-9] = RANDOM.uniform(-20, 100, (22, 22, 22))
    voxels[9:14, 9:-9, 15:20] = RANDOM.uniform(200, 1400, (5, 22, 5))
    return np.rint(voxels + RANDOM.normal(0, 20, voxels.shape))


def scaled(voxels: np.ndarray, high: float) -> np.ndarray:
    return np.clip((voxels + 175) / 425, 0, 1) * high


def blocks(values: list[int]) -> np.ndarray:
    """Cubes of labels in a background of 0."""
    voxels = np.zeros((60, 60, 60))
    for value in values:
        x, y, z = RANDOM.integers(0, 50, 3)
        voxels[x : x + 9, y : y + 9, z : z + 9] = value
    return voxels


def result(voxels: np.ndarray, stated: IntensityRule | None = None) -> IntensityRule:
    image = voxels.astype(np.float32)
    rule = map_to_unit(SCAN, image, stated)
    assert image.min() >= 0
    assert image.max() <= 1
    return rule


def refusal(voxels: np.ndarray, stated: IntensityRule | None = None) -> str:
    image = voxels.astype(np.float32)
    with pytest.raises(VolumeError) as caught:
        map_to_unit(SCAN, image, stated)
    assert np.array_equal(image, voxels.astype(np.float32))
    assert str(caught.value).startswith("scan.nii.gz: ")
    assert "\n" not in caught.value.reason
    return caught.value.reason


@pytest.mark.parametrize(
    "voxels",
    [
        pytest.param(ct(), id="in-air"),
        pytest.param(ct(-1024), id="in-air-at-1024"),
        pytest.param(np.pad(ct(), 8, constant_values=-2000), id="padding-of-2000"),
        pytest.param(np.pad(ct(), 8, constant_values=-3024), id="padding-of-3024"),
        pytest.param(np.pad(ct(), 40, constant_values=-1000), id="much-air"),
        pytest.param(RANDOM.integers(-100, 200, (30, 30, 30)), id="no-air"),
        pytest.param(RANDOM.uniform(-100, 200, (30, 30, 5)), id="a-thin-slab-of-floats"),
        pytest.param(np.rint(ct() / 8) * 8, id="256-levels"),
        pytest.param(ct() + RANDOM.normal(0, 90, (40, 40, 40)), id="noise"),
    ],
)
def test_hounsfield_units_are_known(voxels: np.ndarray) -> None:
    assert result(voxels) == CT


@pytest.mark.parametrize(
    "voxels",
    [
        pytest.param(mr(), id="whole-numbers"),
        pytest.param(mr() * 2.7, id="scaled"),
        pytest.param(np.where(mr() < 20, 0, mr()), id="zero-background"),
        pytest.param(
            np.where(RANDOM.random((40, 40, 40)) < 0.3, RANDOM.exponential(3, (40,) * 3), 0), id="suv"
        ),
        pytest.param(mr() - 5 * (RANDOM.random((40, 40, 40)) < 0.01), id="undershoots"),
        pytest.param(np.pad(mr(), 8), id="zeros-around-noise"),
        pytest.param(np.pad(mr() / 8, 8), id="zeros-around-noise-of-1"),
        pytest.param(mr() / mr().max() * 80, id="scaled-to-80"),
        pytest.param(np.where(RANDOM.random((40,) * 3) < 0.3, RANDOM.gamma(0.5, 9e3, (40,) * 3), 0), id="bq"),
    ],
)
def test_magnitude_images_are_known(voxels: np.ndarray) -> None:
    assert result(voxels) == MR


@pytest.mark.parametrize(
    ("voxels", "rule"),
    [
        pytest.param(ct() + 1024, "{ct_window: [849, 1274]} for a CT saved with 1024 added", id="stored-ct"),
        pytest.param(np.clip(ct(-1024) + 1024, 0, 4095), "{ct_window: [849, 1274]}", id="stored-12-bit"),
        pytest.param(np.pad(ct() + 1024, 8, constant_values=-2000), "[849, 1274]}", id="stored-and-padded"),
        pytest.param(scaled(ct(), 1), "{ct_window: [0, 0.86", id="unit"),
        pytest.param(np.rint(scaled(ct() * 1.3, 255)), "{ct_window: [0, 25", id="bytes"),
        pytest.param(scaled(ct() * 1.3, 255), "{ct_window: [0, 25", id="bytes-as-floats"),
        pytest.param(np.clip(ct(), 0, 190), "{ct_window: [0, 19", id="clipped-at-both-ends"),
        pytest.param(body().clip(0), "{ct_window: [0, 250]} for a CT that was cut off at 0", id="cut-at-0"),
        pytest.param(body().clip(0) * 1.001, "{ct_window: [0, 250]}", id="cut-at-0-as-floats"),
        pytest.param(body().clip(-60) + 60, "{ct_window: [0, 250]}", id="cut-below-0-and-shifted"),
        pytest.param(body().clip(-200, 300) + 200, "{ct_window: [0, 500]}", id="cut-to-500-and-shifted"),
        pytest.param(np.pad(body().clip(-1024) + 3024, 8), "{ct_window: [0, 3", id="padded-far-below-air"),
        pytest.param(mr() / mr().max(), "{mr_percentile: [0.5, 99.5]}", id="mr-as-unit"),
        pytest.param((mr() - mr().mean()) / mr().std(), "{mr_percentile: [0.5, 99.5]}", id="z-scores"),
        pytest.param(RANDOM.integers(-4096, 4096, (40, 40, 40)), "{ct_window: [-4", id="phase"),
        pytest.param(
            RANDOM.integers(-1000, 1000, (40, 40, 40)), "{ct_window: [-99", id="phase-in-milliradians"
        ),
        pytest.param(ct() / 1000, "{ct_window: [-1, 0.19", id="ct-in-thousands"),
    ],
)
def test_values_that_do_not_tell_are_refused_with_the_rules_that_would_fit(
    voxels: np.ndarray, rule: str
) -> None:
    reason = refusal(voxels)
    assert "no intensity rule is stated" in reason
    assert rule in reason
    assert "--intensity '{kind: ct_window, low: " in reason


@pytest.mark.parametrize("stated", [None, CT])
def test_the_rule_that_is_refused_is_not_the_one_that_would_fit(stated: IntensityRule | None) -> None:
    """Of a CT that was cut off between 0 HU and the window's lower end."""
    voxels = np.clip(RANDOM.normal(20, 60, (40, 40, 40)), -50, 600).round()
    reason = refusal(voxels, stated)
    assert "the window does not fit" in reason
    assert "state {ct_window: [-50, 250]} for a CT that was cut off at -50 HU" in reason
    window = IntensityRule("ct_window", -50.0, 250.0)
    assert result(voxels, window) == window


def test_real_scans_are_known_and_those_that_were_cut_off_are_not(sample_data: Path) -> None:
    for path in sorted((sample_data.parent / "volumes").iterdir()):
        voxels = np.asarray(nib.load(path).dataobj)[::2, ::2, ::2]  # type: ignore[attr-defined]
        assert result(voxels) == (CT if path.name.startswith("ct") else MR), path.name
        if path.name == "ct.nii.gz":
            for shift in (0, 100, 1024, 3024):
                assert "ct_window" in refusal(voxels.clip(-shift) + shift), shift


@pytest.mark.parametrize(
    ("voxels", "fault"),
    [
        pytest.param(ct() + 1024, r"are no Hounsfield units", id="stored-ct"),
        pytest.param(scaled(ct(), 1), "flat image after ct_window [-175, 250]", id="unit"),
        pytest.param(scaled(ct(), 10), "flat image after", id="tens"),
        pytest.param(np.rint(scaled(ct(), 255)), "the window does not fit", id="bytes"),
        pytest.param(mr(), "the window does not fit", id="mr"),
        pytest.param(body().clip(0), "the window does not fit", id="cut-at-0"),
        pytest.param(
            np.where(ct() > -1000, 500, -1000) + RANDOM.integers(0, 9, (40,) * 3), "saturated", id="high"
        ),
        pytest.param(RANDOM.normal(-1000, 20, (30, 30, 30)), "constant image", id="air"),
    ],
)
def test_a_stated_window_that_leaves_nothing_is_refused(voxels: np.ndarray, fault: str) -> None:
    reason = refusal(voxels, CT)
    assert fault in reason
    assert "state {ct_window: [" in reason


def test_the_rule_that_a_refusal_names_is_accepted() -> None:
    assert result(ct() + 1024, IntensityRule("ct_window", 849, 1274)).low == 849
    assert result(scaled(ct(), 1), IntensityRule("ct_window", 0, 0.866)).high == 0.866
    assert result(body().clip(0), IntensityRule("ct_window", 0, 250)).low == 0
    assert result(body().clip(-200, 300), CT) == CT
    assert result(mr(), MR) == result(ct(), MR) == MR


@pytest.mark.parametrize("stated", [None, CT])
def test_an_almost_empty_scan_is_refused(
    stated: IntensityRule | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intensity, "SAMPLE", 1000)
    voxels = np.full((20, 20, 20), -1000)
    voxels[1, 1, 1:4] = 40, 50, 60  # not in the sample
    assert "from -1000 to" in refusal(voxels, stated)


@pytest.mark.parametrize("stated", [None, CT, MR])
@pytest.mark.parametrize(
    ("voxels", "what"),
    [
        (ct() > -1000, "a mask, not a scan: every voxel is 0 or 1"),
        ((ct() > -1000) * 255, "a mask, not a scan: every voxel is 0 or 255"),
        (np.where(ct() > -1000, 0, -1024), "a mask, not a scan: every voxel is -1024 or 0"),
        (
            RANDOM.integers(0, 5, (30, 30, 30)),
            "a label map, not a scan: 5 different whole numbers from 0 to 4",
        ),
        (blocks([1, 2, 3]), "a label map, not a scan: 4 different"),
        (blocks(list(range(1, 60))), "a label map, not a scan"),
        (blocks([1003, 2035, *range(40, 60)]), "a label map, not a scan"),
    ],
)
def test_masks_and_label_maps_are_refused(
    voxels: np.ndarray, what: str, stated: IntensityRule | None
) -> None:
    assert what in refusal(voxels, stated)


@pytest.mark.parametrize("stated", [None, MR])
@pytest.mark.parametrize(
    ("voxels", "what"),
    [
        (blocks([1, 2, 3]) / 3, "a label map, not a scan: 4 different values from 0 to 1"),
        (blocks([-2, 5]), "a label map, not a scan: 3 different values from -2 to 5"),
    ],
)
def test_few_values_are_labels_whatever_they_are(
    voxels: np.ndarray, what: str, stated: IntensityRule | None
) -> None:
    assert what in refusal(voxels, stated)
    assert "flat image" in refusal(voxels, CT)


@pytest.mark.parametrize(
    ("modality", "rule"),
    [
        *(
            (text, CT)
            for text in ("CT", "ct ", "CTA", "CBCT", "Computed Tomography", "CT_abdomen", "LDCT", "X-ray CT")
        ),
        *((text, MR) for text in ("MRI", "MR", "T1w", "t2", "FLAIR", "ADC", "T1-Gd", "PET", "SPECT", "DWI")),
        ("single photon emission computed tomography", MR),
        *((text, CT) for text in ("CAT scan", "CTscan", "4DCT", "DECT", "HU", "non-contrast CT", "4D-CBCT")),
        *((text, MR) for text in ("MRT", "FDG", "IRM", "18F-FDG PET")),
        *((text, None) for text in ("non-CT", "Not CT", "nonCT", "no MRI", "cat")),
        *(
            (text, None)
            for text in ("CT/PET", "", "noNorm", "zscore", "rescale_to_0_1", "audio", None, 3, ["CT"])
        ),
    ],
)
def test_modalities_in_all_their_spellings(modality: object, rule: IntensityRule | None) -> None:
    assert rule_of_modality(modality) == rule

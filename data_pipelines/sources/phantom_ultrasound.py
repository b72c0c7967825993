"""Phantoms of ultrasound: the heart's four chambers, and a view of liver, gallbladder and kidney.

The patient's left is on the image's right. Every scene function paints into an empty `Scene`, adds its regions and
takes the lesions that it must try to draw; numbers in it are scene units and grey values.
"""

import functools
from typing import NamedTuple

import cv2
import numpy as np

from data_pipelines.sources.phantom_shapes import Scene, blob, ellipse, spline

HEART_LESIONS = ("pericardial_effusion", "cardiac_thrombus")
LIVER_LESIONS = ("gallstone", "liver_cyst", "kidney_cyst")

# fmt: off
_HEART = ((0, -0.62), (0.3, -0.42), (0.43, 0.1), (0.4, 0.55), (0.2, 0.78), (-0.2, 0.78), (-0.4, 0.55), (-0.4, 0.1),
          (-0.26, -0.4))
_SEPTUM = ((-0.04, -0.45), (0.02, -0.5), (0.045, -0.1), (0.04, 0.26), (-0.05, 0.26), (-0.07, 0.0))
_LIVER = ((-0.75, -0.5), (0.0, -0.56), (0.6, -0.45), (0.5, -0.05), (0.15, 0.3), (-0.3, 0.62), (-0.75, 0.55),
          (-0.9, 0.0))
# fmt: on


class _Sector(NamedTuple):
    """What the probe sees: float32[size, size], depth and beam of each pixel in pixels; uint8[size, size], 1 inside."""

    depth: np.ndarray
    beam: np.ndarray
    inside: np.ndarray


@functools.lru_cache(maxsize=32)
def _sector(size: int, degrees: int) -> _Sector:
    """Returns a sector of `degrees` to each side."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    x, y = axis[None, :], axis[:, None] + 1.08
    depth, angle = np.hypot(x, y), np.arctan2(x, y)
    inside = (np.abs(angle) < np.radians(degrees)) & (depth < 2.02) & (depth > 0.12)
    return _Sector(depth * size / 2, (angle + 1) * size / 2, inside.astype(np.uint8))


def _choose_sector(scene: Scene) -> _Sector:
    return _sector(scene.size, int(scene.rng.integers(36, 47)))


def four_chambers(scene: Scene, lesions: tuple[str, ...]) -> None:
    """The apical view of the heart: ventricles next to the probe, atria below."""
    rng = scene.rng
    sector = _choose_sector(scene)
    scene.image += 0.13 * scene.field(8)
    outer = spline(np.array(_HEART) + rng.normal(0, 0.012, (len(_HEART), 2)))
    heart = scene.fill(outer, sector.inside)
    if "pericardial_effusion" in lesions:
        rim = cv2.subtract(scene.fill(outer * 1.08 + (scene.between(-0.06, 0.06), 0.0), sector.inside), heart)
        scene.paint(scene.fill(outer * 1.14), 0.75)
        scene.paint(rim, 0.03)
        scene.add("pericardial_effusion", rim)
    scene.paint(heart, 0.5, softness=1.5, mottle=(0.1, 16))
    scene.add("heart", heart)
    squeeze = scene.between(0.75, 1.1)  # between systole and diastole
    chambers = {
        "left_ventricle": (0.19, -0.1, 0.14 * squeeze, 0.33, -0.12),
        "right_ventricle": (-0.2, -0.02, 0.105 * squeeze, 0.26, 0.2),
        "left_atrium": (0.19, 0.5, 0.15 / squeeze**0.5, 0.17, 0.0),
        "right_atrium": (-0.19, 0.5, 0.14 / squeeze**0.5, 0.16, 0.0),
    }
    cavities = {}
    for label, (x, y, rx, ry, angle) in chambers.items():
        cavities[label] = scene.organ(label, blob(rng, x, y, rx, ry, roughness=0.06, angle=angle), 0.04, within=heart)
    ventricles = cv2.bitwise_or(cavities["left_ventricle"], cavities["right_ventricle"])
    scene.add("interventricular_septum", cv2.subtract(scene.fill(spline(_SEPTUM), heart), ventricles))
    for x in (-0.19, 0.19):  # valve leaflets
        tip = (x + rng.normal(0, 0.02), 0.16 + 0.08 * squeeze)
        leaflets = [np.array([(x - 0.12, 0.27), tip]), np.array([(x + 0.12, 0.27), tip])]
        scene.paint(scene.stroke(leaflets, 0.025), 0.85)
    muscle = scene.fill(blob(rng, -0.21, -0.12, 0.03, 0.06, roughness=0.2), cavities["right_ventricle"])
    scene.paint(muscle, 0.6)  # the moderator band: where a clot would look the same
    if "cardiac_thrombus" in lesions:
        clot = scene.lump(cavities["left_ventricle"], scene.between(0.05, 0.08), roughness=0.15)
        scene.paint(clot, 0.62)
        scene.add("cardiac_thrombus", clot, "left_ventricle")
    scene.paint(scene.fill(ellipse(0.34, 0.9, 0.08, 0.06)), 0.06)  # the descending aorta
    _insonate(scene, sector)


def liver_view(scene: Scene, lesions: tuple[str, ...]) -> None:
    """The liver with its veins, the gallbladder, and the kidney behind."""
    rng = scene.rng
    sector = _choose_sector(scene)
    scene.image += 0.2 + 0.1 * scene.field(8)
    layers = [spline([(-0.8, y), (0, y + rng.normal(0, 0.02)), (0.8, y)], closed=False) for y in (-0.72, -0.66, -0.6)]
    scene.paint(scene.stroke(layers, 0.02), 0.7)
    bean = blob(rng, 0.33, 0.38, 0.28, 0.15, roughness=0.05, angle=scene.between(-0.5, 0.1))
    kidney = scene.fill(bean, sector.inside)
    room = cv2.subtract(sector.inside, kidney)
    outline = spline(np.array(_LIVER) + rng.normal(0, 0.02, (len(_LIVER), 2)))
    liver = scene.organ("liver", outline, 0.42, within=room, softness=1.5, mottle=(0.06, 20))
    diaphragm = spline([(-0.95, 0.35), (-0.7, 0.65), (-0.3, 0.72), (0.0, 0.62)], closed=False)
    scene.paint(scene.stroke([diaphragm], 0.035), 0.95)
    for _ in range(rng.integers(3, 6)):  # veins cut across: dark and round like cysts, but walled or drawn out
        x, y = rng.uniform((-0.6, -0.35), (0.1, 0.3))
        outline = blob(rng, x, y, scene.between(0.06, 0.14), 0.022, roughness=0.1, angle=scene.between(-0.8, 0.8))
        vein = scene.fill(outline, liver)
        scene.paint(scene.grow(vein, 1), 0.75, opacity=0.6)
        scene.paint(vein, 0.08)
    scene.paint(scene.grow(kidney, 2), 0.75)
    scene.paint(kidney, 0.3)
    x, y, w, h = cv2.boundingRect(kidney)
    sinus = blob(rng, x + w / 2, y + h / 2, 0.27 * w, 0.2 * h, roughness=0.15)
    scene.paint(scene.fill(sinus, kidney, posed=False), 0.8, softness=3)
    scene.add("kidney", kidney)
    sac = scene.fill(blob(rng, 0.3, -0.16, 0.2, 0.085, roughness=0.06, angle=scene.between(-0.9, 0.2)), sector.inside)
    scene.paint(scene.grow(sac, 1), 0.8)
    scene.paint(sac, 0.03)
    _enhance_behind(scene, sac)
    scene.add("gallbladder", sac)

    shadow = np.zeros_like(sac)
    if "gallstone" in lesions:
        stone = scene.lump(sac, scene.between(0.035, 0.055), roughness=0.12)
        if scene.add("gallstone", stone):
            left, top, width, _ = cv2.boundingRect(stone)
            right, middle, end = left + width, top + 0.3 * width, scene.size
            cone = [(left, middle), (right, middle), (right + 0.3 * width, end), (left - 0.3 * width, end)]
            shadow = scene.fill(np.array(cone), posed=False)
            scene.paint(shadow, 0.02, softness=1.5, opacity=0.85)
            scene.paint(stone, 0.97)
    liver = cv2.subtract(liver, scene.grow(sac, 2))
    for label, host, radius in (("liver_cyst", liver, (0.06, 0.12)), ("kidney_cyst", kidney, (0.05, 0.07))):
        if label in lesions:
            cyst = scene.lump(cv2.subtract(host, scene.grow(shadow, 2)), scene.between(*radius), roughness=0.03)
            scene.paint(cyst, 0.02)
            _enhance_behind(scene, cyst)
            scene.add(label, cyst)
    _insonate(scene, sector)


def _enhance_behind(scene: Scene, fluid: np.ndarray) -> None:
    """Brightens what lies behind a fluid, which hardly weakens the sound."""
    _, _, _, height = cv2.boundingRect(fluid)
    down = np.array([[1.0, 0, 0], [0, 1, height]])
    behind = cv2.warpAffine(fluid, down, (scene.size, scene.size), flags=cv2.INTER_NEAREST)
    scene.paint(cv2.subtract(behind, fluid), 0.85, softness=6, opacity=0.4)


def _insonate(scene: Scene, sector: _Sector) -> None:
    """Speckle along the beams, attenuation with depth, log compression, and nothing outside the sector."""
    scene.soften()
    wave = np.ascontiguousarray(scene.grain(0.8))
    speckle = cv2.remap(wave, sector.beam, sector.depth, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    scene.image *= 1 + 0.42 * speckle
    scene.image += 0.03 * np.abs(speckle)
    scene.image *= (1.15 - 0.35 * sector.depth / scene.size) * sector.inside
    np.clip(scene.image, 0, 1, out=scene.image)

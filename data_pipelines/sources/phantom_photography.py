"""Phantoms in colour: fundus photograph, blood smear, colonoscopy and dermoscopy.

Every scene function paints into an empty `Scene`, adds its regions and takes the lesions that it must try to draw;
numbers in it are scene units and RGB values.
"""

import functools
from typing import NamedTuple

import cv2
import numpy as np

from data_pipelines.sources.phantom_shapes import Scene, blob, ellipse, half_plane, spline

FUNDUS_LESIONS = ("hard_exudate", "retinal_hemorrhage", "cotton_wool_spot")
SMEAR_LESIONS = ("malaria_parasite",)
ENDOSCOPY_LESIONS = ("polyp", "ulcer")
DERMOSCOPY_LESIONS = ("melanoma", "nevus")


def fundus(scene: Scene, lesions: tuple[str, ...]) -> None:
    """A photograph centred between macula and optic disc; a right eye has its disc on the image's right."""
    rng = scene.rng
    side, sign = (("right", 1.0), ("left", -1.0))[rng.integers(2)]
    retina = scene.fill(ellipse(0, 0, 0.95, 0.95, points=80))
    base = np.array([0.74, 0.36, 0.16]) * scene.between(0.8, 1.1) + rng.normal(0, 0.02, 3)
    scene.paint(retina, base)
    disc_x, disc_y = sign * scene.between(0.38, 0.46), scene.between(-0.06, 0.04)
    fovea_x, fovea_y = disc_x - sign * 0.5, disc_y + 0.05

    macula = scene.fill(blob(rng, fovea_x, fovea_y, 0.2, 0.2, roughness=0.05))
    scene.paint(macula, base * (0.72, 0.6, 0.6), softness=9, opacity=0.7)
    fovea = scene.fill(blob(rng, fovea_x, fovea_y, 0.06, 0.06, roughness=0.05))
    scene.paint(fovea, base * (0.5, 0.38, 0.4), softness=3, opacity=0.7)

    trunks, branches = [], []
    for up in (-1.0, 1.0):
        for lag in (0.0, 0.05):
            temporal = [(0, 0), (-0.06, 0.26), (-0.3, 0.45 + lag), (-0.68, 0.42 + lag), (-1.05, 0.25)]
            nasal = [(0, 0), (0.1, 0.22), (0.26, 0.42 - 2 * lag), (0.5, 0.62 - 2 * lag)]
            for arc in (temporal, nasal):
                points = np.array(arc) * (sign, up) + (disc_x, disc_y)
                points[1:] += rng.normal(0, 0.025, (len(arc) - 1, 2))
                trunk = spline(points, closed=False)
                trunks.append(trunk)
                at = rng.integers(5, len(trunk) - 3, 4)
                ahead = trunk[at + 2] - trunk[at]
                turn = rng.uniform(0.5, 1.1, 4) * rng.choice([-1, 1], 4)
                direction = np.arctan2(ahead[:, 1], ahead[:, 0]) + turn
                step = 0.13 * np.stack([np.cos(direction), np.sin(direction)], 1)
                bends = rng.normal(0, 0.02, (4, 4, 2)) * [[0], [1], [1], [1]]
                branches.extend(trunk[at][:, None] + np.arange(4)[:, None] * step[:, None] + bends)
    thick = cv2.bitwise_or(scene.stroke([trunk[:13] for trunk in trunks], 0.026), scene.stroke(trunks, 0.017))
    thick = cv2.bitwise_and(thick, retina)
    thin = cv2.bitwise_and(scene.stroke(branches, 0.012), retina)
    scene.paint(thin, base * (0.7, 0.54, 0.54))
    scene.paint(thick, base * (0.6, 0.38, 0.4))
    disc = scene.fill(blob(rng, disc_x, disc_y, 0.115, 0.13, roughness=0.025))
    scene.paint(disc, (0.97, 0.76, 0.46), softness=1.6, opacity=0.85)
    ratio = scene.between(0.35, 0.7)
    cup = scene.fill(blob(rng, disc_x - sign * 0.01, disc_y, 0.11 * ratio, 0.12 * ratio, roughness=0.04), disc)
    scene.paint(cup, (1.0, 0.93, 0.72))
    scene.paint(cv2.bitwise_and(thick, disc), base * (0.6, 0.35, 0.35), opacity=0.6)

    scene.add(f"{side}_retina", retina)
    for half, toward in (("nasal", sign), ("temporal", -sign)):
        scene.add(f"{half}_retina", scene.fill(half_plane(fovea_x, toward), retina), f"{side}_retina")
    scene.add("macula", macula, f"{side}_retina")
    scene.add("fovea", fovea)
    scene.add("optic_disc", disc, f"{side}_retina")
    scene.add("optic_cup", cup)
    scene.add("retinal_vessel", cv2.bitwise_or(thick, thin), f"{side}_retina")
    place = cv2.subtract(scene.grow(retina, -4), scene.grow(disc, 7))
    looks = {  # radius, roughness, RGB, softness
        "hard_exudate": ((0.025, 0.05), 0.3, (0.98, 0.88, 0.45), 0.7),
        "retinal_hemorrhage": ((0.04, 0.09), 0.25, base * (0.42, 0.18, 0.25), 1.0),
        "cotton_wool_spot": ((0.07, 0.11), 0.25, (0.95, 0.86, 0.7), 3.5),
    }
    for lesion in lesions:
        (low, high), roughness, color, softness = looks[lesion]
        for _ in range(rng.integers(1, 5)):
            spot = scene.lump(scene.free(place), scene.between(low, high), roughness=roughness)
            scene.paint(spot, color, softness=softness, opacity=0.9)
            scene.add(lesion, spot, f"{side}_retina")
    if scene.chance(0.4):  # a reflex of the flash: bright like an exudate, but a crescent at the rim
        reflex = scene.stroke([ellipse(0, 0, 0.88, 0.88)[rng.integers(40) :][:6]], 0.03)
        scene.paint(cv2.bitwise_and(reflex, retina), (0.9, 0.85, 0.8), softness=3, opacity=0.6)
    scene.soften()
    scene.shade(1.08, 0.42)
    scene.image *= 1 + 0.04 * scene.field(5)
    scene.texture(retina, 0.012, 1.2)


class _Cell(NamedTuple):
    """Middle, radius and outline in scene units, and the mask."""

    x: float
    y: float
    radius: float
    outline: np.ndarray
    mask: np.ndarray


def _strew_cells(scene: Scene, magnification: float) -> dict[str, list[_Cell]]:
    """Lays cells over one another, the kinds in the order of the result, and takes away those that others hide."""
    rng = scene.rng
    kinds = {  # how many, how far from the middle, radius, roughness, least part that is seen
        "red_blood_cell": (rng.integers(9, 20), 1.0, 0.17, 0.03, 0.4),
        "platelet": (rng.integers(1, 7), 0.95, 0.055, 0.15, 0.8),
        "white_blood_cell": (rng.choice([0, 1, 1, 1, 2]), 0.75, 0.31, 0.05, 0.9),
    }
    strewn = []
    for label, (count, reach, radius, roughness, least) in kinds.items():
        for x, y in rng.uniform(-reach, reach, (count, 2)).tolist():
            r = radius * magnification * scene.between(0.87, 1.13)
            outline = blob(rng, x, y, r, r * scene.between(0.88, 1.0), roughness=roughness, angle=scene.between(0, 3))
            strewn.append((label, least, _Cell(x, y, r, outline, scene.fill(outline))))
    cells: dict[str, list[_Cell]] = {label: [] for label in kinds}
    covered = np.zeros((scene.size, scene.size), np.uint8)
    for label, least, cell in reversed(strewn):
        if cv2.countNonZero(cv2.subtract(cell.mask, covered)) > least * cv2.countNonZero(cell.mask):
            cells[label].insert(0, cell)
            covered |= cell.mask
    return cells


def blood_smear(scene: Scene, lesions: tuple[str, ...]) -> None:
    """Red cells with their pale centres, overlapping; white cells with their nucleus; platelets; stain deposits."""
    rng = scene.rng
    tint = rng.normal(0, 0.02, 3)
    scene.image += 0.03 * scene.field(3)
    red = np.array([0.8, 0.52, 0.54]) + tint
    magnification = scene.between(0.8, 1.15)
    cells = _strew_cells(scene, magnification)
    pallors = []
    for cell in cells["red_blood_cell"]:
        scene.paint(cell.mask, red * scene.between(0.94, 1.05) * (0.96, 0.93, 0.95), opacity=0.85)
        pallors.append((cell.outline - (cell.x, cell.y)) * scene.between(0.35, 0.55) + (cell.x, cell.y))
        scene.add("red_blood_cell", cell.mask)
    scene.paint(scene.fill_all(pallors), red * 0.55 + 0.42, softness=3.5, opacity=0.8)
    cores = []
    for cell in cells["platelet"]:
        scene.paint(cell.mask, np.array([0.58, 0.4, 0.66]) + tint, opacity=0.9)
        cores.append(blob(rng, cell.x, cell.y, 0.5 * cell.radius, 0.5 * cell.radius, roughness=0.3))
        scene.add("platelet", cell.mask)
    scene.paint(scene.fill_all(cores), np.array([0.45, 0.26, 0.56]) + tint)
    for x, y, r, _, mask in cells["white_blood_cell"]:
        scene.paint(mask, np.array([0.76, 0.68, 0.84]) + tint, softness=1.5, opacity=0.95, mottle=(0.03, 40))
        if scene.chance(0.5):  # a lobed nucleus, or a round one that nearly fills the cell
            turns = scene.between(0, 2 * np.pi) + 1.15 * np.arange(rng.integers(2, 5))
            spots = zip(x + 0.42 * r * np.cos(turns), y + 0.42 * r * np.sin(turns), strict=True)
            lobes = [blob(rng, u, v, 0.38 * r, 0.32 * r, roughness=0.1) for u, v in spots]
        else:
            lobes = [blob(rng, x, y, 0.72 * r, 0.66 * r, roughness=0.07)]
        nucleus = scene.fill_all(lobes, mask)
        scene.paint(nucleus, np.array([0.42, 0.23, 0.55]) + tint, mottle=(0.06, 32))
        if scene.add("white_blood_cell", mask):
            scene.add("white_blood_cell_nucleus", nucleus)
    if lesions:
        others = [cell.mask for cell in (*cells["platelet"], *cells["white_blood_cell"])]
        covered = functools.reduce(cv2.bitwise_or, others, np.zeros((scene.size, scene.size), np.uint8))
        for k in rng.permutation(len(cells["red_blood_cell"]))[: rng.integers(1, 4)]:
            place = scene.free(cv2.subtract(cells["red_blood_cell"][k].mask, covered))
            parasite = scene.lump(place, 0.055 * magnification, roughness=0.1)
            scene.paint(parasite, (0.45, 0.25, 0.6))
            scene.paint(scene.grow(parasite, -2), red + 0.1)
            scene.add("malaria_parasite", parasite)
    # Stain deposits: the parasites' and platelets' colour, but no cells.
    grit = [blob(rng, x, y, 0.018, 0.014, roughness=0.4) for x, y in rng.uniform(-1, 1, (rng.integers(0, 5), 2))]
    scene.paint(scene.fill_all(grit), (0.2, 0.12, 0.3))
    scene.soften()
    scene.shade(1.03, 0.1)
    scene.image += 0.01 * scene.grain(0.8)


def colonoscopy(scene: Scene, lesions: tuple[str, ...]) -> None:
    """Mucosa with folds around a dark lumen; polyps lit from the scope; bubbles and reflexes that are none."""
    rng = scene.rng
    view = scene.fill(ellipse(0, 0, 0.98, 0.98, points=8 if scene.chance(0.4) else 64))
    mucosa = np.array([0.8, 0.42, 0.34]) * scene.between(0.85, 1.1) + rng.normal(0, 0.03, 3)
    scene.paint(view, mucosa)
    scene.image += 0.04 * scene.field(6) * view
    hole_x, hole_y = rng.uniform(-0.35, 0.35, 2)
    relief = np.ones((1, scene.size, scene.size), np.float32)  # brightness of the wall, which falls off into the depth
    for k in range(4, 0, -1):  # folds, nearer ones larger, each with a lit edge
        r = 0.2 + 0.19 * k
        fold = blob(rng, hole_x, hole_y, r, r * 0.9, roughness=0.1)
        scene.paint(scene.fill(fold, view), 1.2, softness=1.5, opacity=0.5, onto=relief)
        inner = (fold - (hole_x, hole_y)) * (0.96, 0.94) + (hole_x, hole_y)
        scene.paint(scene.fill(inner, view), 0.45 + 0.12 * k, softness=5, opacity=0.8, onto=relief)
    lumen = scene.fill(blob(rng, hole_x, hole_y, 0.22, 0.19, roughness=0.12, angle=scene.between(0, 3)), view)
    scene.paint(lumen, 0.12, softness=5, onto=relief)
    scene.image *= relief
    twigs = rng.uniform(-0.9, 0.9, (9, 1, 2)) + np.cumsum(rng.normal(0, 0.1, (9, 5, 2)), 1)
    wall = cv2.subtract(view, scene.grow(lumen, 4))
    scene.paint(cv2.bitwise_and(scene.stroke(twigs, 0.01), wall), mucosa * (0.8, 0.5, 0.5), opacity=0.5)
    scene.add("colon", view)
    scene.add("bowel_lumen", lumen)
    for lesion in lesions:
        if lesion == "polyp":
            for _ in range(1 + int(scene.chance(0.25))):
                polyp = scene.lump(scene.free(wall), scene.between(0.14, 0.3), roughness=0.1)
                x, y, w, h = cv2.boundingRect(polyp)
                aside = np.array([[1.0, 0, 0.08 * w], [0, 1, 0.1 * h]])
                shadow = cv2.warpAffine(polyp, aside, (scene.size, scene.size))
                scene.paint(cv2.bitwise_and(shadow, scene.free(view)), mucosa * 0.35, softness=5, opacity=0.7)
                scene.paint(polyp, mucosa * (1.0, 0.75, 0.75), softness=1.5)
                lit = blob(rng, x + 0.42 * w, y + 0.4 * h, 0.3 * w, 0.3 * h, roughness=0.1)
                scene.paint(scene.fill(lit, polyp, posed=False), mucosa * (1.2, 1.1, 1.05), softness=7, opacity=0.8)
                glint = scene.fill(blob(rng, x + 0.38 * w, y + 0.3 * h, 0.06 * w, 0.04 * h), polyp, posed=False)
                scene.paint(glint, (1.0, 0.98, 0.95))
                scene.add(lesion, polyp)
        else:
            ulcer = scene.lump(scene.free(wall), scene.between(0.12, 0.2), roughness=0.25)
            rim = cv2.bitwise_and(scene.grow(ulcer, 4), scene.free(view))
            scene.paint(rim, mucosa * (1.0, 0.5, 0.5), softness=3, opacity=0.8)
            scene.paint(ulcer, (0.86, 0.8, 0.62), softness=1.5, mottle=(0.08, 24))
            scene.add(lesion, ulcer)
    glints, rims = np.zeros_like(view), np.zeros_like(view)
    for _ in range(rng.integers(3, 10)):  # reflexes
        glints |= scene.lump(wall, scene.between(0.012, 0.035), roughness=0.4)
    for _ in range(rng.integers(0, 4)):  # bubbles: as round as polyps, but hollow
        rims |= scene.lump(wall, scene.between(0.05, 0.1), roughness=0.02)
    scene.paint(glints, (1.0, 0.98, 0.96))
    scene.paint(cv2.subtract(rims, scene.grow(rims, -1)), mucosa * 1.35)
    scene.soften()
    scene.shade(1.15, 0.4)
    scene.texture(view, 0.012, 0.8)


def dermoscopy(scene: Scene, lesions: tuple[str, ...]) -> None:
    """Skin under a dermatoscope: a mole, or a melanoma with its ragged border and colours, globules, hairs."""
    rng = scene.rng
    tone = np.array([0.87, 0.67, 0.57]) * scene.between(0.75, 1.08) + rng.normal(0, 0.02, 3)
    view = scene.fill(ellipse(0, 0, 1.2, 1.2, points=64))
    scene.paint(view, tone, softness=3)
    scene.image *= 1 + 0.04 * scene.field(7) + 0.03 * scene.grain(2.0)
    scene.add("skin", view)
    for lesion in lesions:
        wild = lesion == "melanoma"
        radius, roughness = (scene.between(0.3, 0.5), 0.24) if wild else (scene.between(0.2, 0.4), 0.06)
        mole = scene.lump(scene.free(view), radius, roughness=roughness, harmonics=(2, 9))
        brown = np.array([0.4, 0.23, 0.15]) * scene.between(0.8, 1.3)
        scene.paint(mole, brown, softness=2 if wild else 4, opacity=0.9, mottle=(0.05, 20))
        if wild:
            for color in ((0.14, 0.09, 0.09), (0.32, 0.33, 0.42), (0.62, 0.3, 0.22)):
                patch = scene.lump(mole, scene.between(0.1, 0.2), roughness=0.3)
                scene.paint(patch, color, softness=4, opacity=0.8)
        if not scene.add(lesion, mole):
            continue
        for _ in range(rng.integers(0, 5)):
            globule = scene.lump(mole, scene.between(0.03, 0.05), roughness=0.1)
            scene.paint(globule, brown * 0.4)
            scene.add("pigment_globule", globule, lesion)
            mole = cv2.subtract(mole, scene.grow(globule, 2))
    spots = rng.uniform(-0.9, 0.9, (rng.integers(2, 9), 2))  # freckles: a mole's colour, a globule's size, neither
    freckles = scene.fill_all([blob(rng, x, y, 0.04, 0.035, roughness=0.2) for x, y in spots])
    scene.paint(freckles, tone * (0.72, 0.6, 0.55), softness=2, opacity=0.7)
    hairs = []
    for start, angle in zip(rng.uniform(-1.1, 1.1, (rng.integers(0, 12), 2)), rng.uniform(0, 6.3, 12), strict=False):
        ahead = np.array([np.cos(angle), np.sin(angle)])
        hairs.append(spline([start, start + 0.5 * ahead + rng.normal(0, 0.08, 2), start + ahead], closed=False))
    if hairs:
        scene.paint(scene.stroke(hairs, 0.012), (0.16, 0.1, 0.08), opacity=0.85)
    if scene.chance(0.3):
        ticks = [np.array([(-0.9 + 0.12 * k, 0.82), (-0.9 + 0.12 * k, 0.92)]) for k in range(16)]
        scene.paint(scene.stroke(ticks, 0.012), (0.1, 0.1, 0.1))
    scene.soften()
    scene.shade(1.05, 0.2)

"""Phantoms in grey: chest radiograph, axial abdominal CT and axial brain MRI.

The patient's left is on the image's right, as radiology shows it. Every scene function paints into an empty `Scene`,
adds its regions and takes the lesions that it must try to draw; numbers in it are scene units and grey values.
"""

import functools

import cv2
import numpy as np

from data_pipelines.sources.phantom_shapes import Scene, blob, ellipse, half_plane, mirror, spline

SIDES = (("right", -1.0), ("left", 1.0))  # the patient's side, and the sign of x where it is seen

XRAY_LESIONS = ("lung_nodule", "lung_opacity", "pleural_effusion", "pneumothorax")
CT_LESIONS = ("liver_tumor", "liver_cyst", "kidney_tumor", "kidney_cyst", "kidney_stone")
MRI_LESIONS = ("brain_tumor", "infarct", "white_matter_lesion")

# fmt: off
_BODY = ((-0.3, -1.3), (-0.42, -0.85), (-1.0, -0.7), (-0.92, 0), (-0.95, 1.3),
         (0.95, 1.3), (0.92, 0), (1.0, -0.7), (0.42, -0.85), (0.3, -1.3))
_BELLY = ((-0.9, 0.45), (-0.45, 0.3), (0, 0.42), (0.5, 0.36), (0.9, 0.5), (0.9, 1.4), (-0.9, 1.4))
_LUNGS = (((-0.33, -0.74), (-0.52, -0.52), (-0.66, -0.15), (-0.7, 0.3), (-0.69, 0.52), (-0.45, 0.36), (-0.17, 0.44),
           (-0.15, 0.1), (-0.2, -0.2), (-0.13, -0.5), (-0.2, -0.7)),
          ((0.33, -0.74), (0.52, -0.52), (0.66, -0.15), (0.71, 0.3), (0.7, 0.58), (0.52, 0.43), (0.4, 0.46),
           (0.38, 0.22), (0.22, -0.1), (0.14, -0.5), (0.2, -0.7)))
_HEART = ((-0.02, -0.2), (0.14, -0.12), (0.3, 0.1), (0.44, 0.36), (0.34, 0.5), (0, 0.48), (-0.2, 0.42), (-0.22, 0.15))
_TRACHEA = ((-0.05, -1.0), (0.04, -1.0), (0.035, -0.6), (0.05, -0.36), (-0.05, -0.36), (-0.04, -0.6))
_ARCH = (((-0.09, 0.33), (-0.1, 0.44), (0, 0.5), (0.1, 0.44), (0.09, 0.33)), ((0, 0.5), (0, 0.62)),
         ((-0.1, 0.42), (-0.25, 0.4)), ((0.1, 0.42), (0.25, 0.4)))
_LIVER = ((-0.7, -0.12), (-0.62, -0.36), (-0.35, -0.5), (0.02, -0.44), (0.14, -0.32), (-0.08, -0.16), (-0.25, 0.0),
          (-0.36, 0.15), (-0.52, 0.28), (-0.68, 0.12))
_STOMACH = ((0.16, -0.4), (0.42, -0.46), (0.6, -0.32), (0.55, -0.12), (0.36, -0.06), (0.2, -0.2))
_SPLEEN = ((0.58, -0.12), (0.7, -0.14), (0.75, 0.06), (0.67, 0.28), (0.55, 0.27), (0.61, 0.08))
_PANCREAS = ((-0.15, 0.03), (-0.03, 0.0), (0.12, -0.05), (0.28, -0.04), (0.44, 0.0))
_KIDNEY = ((0.34, 0.2), (0.4, 0.08), (0.5, 0.08), (0.58, 0.2), (0.55, 0.35), (0.45, 0.4), (0.37, 0.34), (0.41, 0.27))
# fmt: on


@functools.cache
def _ribs() -> np.ndarray:
    """Returns float64[16, N, 2], the curves of both sides' ribs as a frontal radiograph shows them."""
    y = -0.72 + 0.155 * np.arange(8)
    wide = 0.5 + 0.3 * np.sqrt((np.arange(8) + 1) / 8)
    x = np.stack([np.full(8, 0.08), np.full(8, 0.3), wide, wide + 0.03], 1)
    right = np.stack([x, y[:, None] + (0.0, -0.07, 0.1, 0.24)], 2)  # [8, 4, 2]
    return spline(np.concatenate([right * (-1, 1), right]), closed=False)


def chest_xray(scene: Scene, lesions: tuple[str, ...]) -> None:
    """A frontal chest radiograph: lungs with their zones, heart, trachea, clavicles, ribs and vessels."""
    rng = scene.rng
    body = scene.fill(spline(_BODY))
    soft = scene.between(0.5, 0.6)
    scene.paint(body, soft, softness=5)
    scene.paint(scene.fill(spline(_BELLY)), soft + 0.18, softness=6)
    scene.paint(scene.stroke([np.array([(0, -1.2), (0, 1.2)])], 0.24), soft + 0.16, softness=4)
    air = scene.between(0.13, 0.25)
    heart = scene.fill(spline(_HEART) * (scene.between(0.85, 1.12), 1))
    outlines, lungs = {}, {}
    for (side, _), outline in zip(SIDES, _LUNGS, strict=True):
        outlines[side] = np.array(outline) + rng.normal(0, 0.012, (len(outline), 2)) + (0, rng.normal(0, 0.03))
        lungs[side] = cv2.subtract(scene.fill(spline(outlines[side])), heart)
        scene.paint(lungs[side], air, softness=2)
    both = cv2.bitwise_or(lungs["left"], lungs["right"])
    scene.paint(scene.fill(blob(rng, 0.07, -0.3, 0.16, 0.16, roughness=0.05)), soft + 0.13, softness=3)
    scene.paint(heart, soft + scene.between(0.12, 0.22), softness=2.5)
    trachea = scene.fill(spline(_TRACHEA))
    scene.paint(trachea, soft - 0.08, softness=2)
    signs = np.repeat([-1.0, 1.0], 9)
    reach, tilt = rng.uniform(0.2, 0.5, 18), rng.uniform(-1.3, 1.2, 18)
    starts = np.stack([signs * 0.17, rng.uniform(-0.15, 0.05, 18)], 1)
    ends = starts + np.stack([signs * reach * np.cos(tilt), reach * np.sin(tilt)], 1)
    vessels = spline(np.stack([starts, (starts + ends) / 2 + rng.normal(0, 0.03, (18, 2)), ends], 1), closed=False)
    scene.paint(cv2.bitwise_and(scene.stroke(vessels, 0.014), both), air + 0.2, opacity=0.5)
    for _, sign in SIDES:
        hilum = scene.fill(blob(rng, sign * 0.22, -0.08, 0.09, 0.15, roughness=0.3), both)
        scene.paint(hilum, soft, softness=5, opacity=0.7)

    scene.add("lung", both)
    scene.add("heart", heart)
    scene.add("trachea", trachea)
    for side, lung in lungs.items():
        scene.add(f"{side}_lung", lung)
        for zone, top, bottom in (("upper", -1.5, -0.36), ("mid", -0.36, 0.02), ("lower", 0.02, 1.5)):
            band = scene.fill(np.array([(-1.5, top), (1.5, top), (1.5, bottom), (-1.5, bottom)]), lung)
            scene.add(f"{side}_{zone}_lung_zone", band)

    for lesion in lesions:
        side, sign = SIDES[rng.integers(2)]
        lung, parent = scene.free(lungs[side]), f"{side}_lung"
        if lesion == "lung_nodule":
            for _ in range(1 + int(scene.chance(0.3))):
                nodule = scene.lump(scene.free(lung), scene.between(0.06, 0.11), roughness=0.1)
                scene.paint(nodule, soft + scene.between(0.05, 0.2), softness=1, opacity=0.9)
                scene.add(lesion, nodule, parent)
        elif lesion == "lung_opacity":
            patch = scene.lump(lung, scene.between(0.17, 0.26), roughness=0.3)
            scene.paint(patch, soft + 0.08, softness=5, opacity=0.75, mottle=(0.12, 24))
            scene.add(lesion, patch, parent)
        elif lesion == "pleural_effusion":
            level = scene.between(0.12, 0.34)
            meniscus = [(0.0, level + 0.1), (0.4, level + 0.1), (0.62, level - 0.05), (0.85, level - 0.3)]
            fluid = scene.fill(spline(mirror([*meniscus, (1.1, 0.4), (0.9, 0.9), (0.0, 0.9)], sign)), lung)
            if scene.add(lesion, fluid, parent):
                scene.paint(scene.grow(fluid, 3), soft + 0.2, softness=2.5)
        else:  # a pneumothorax: black, without vessels, between the chest wall and the edge of the lung sunk inwards
            depth = scene.between(0.12, 0.22) * np.clip(0.5 - outlines[side][:, 1:], 0, 1)
            sunk = scene.fill(spline(outlines[side] + depth * (-sign, 1)))
            rim = cv2.subtract(lung, sunk)
            if scene.add(lesion, rim, parent):
                scene.paint(rim, 0.3 * air, opacity=0.95)
                edge = cv2.bitwise_and(cv2.subtract(sunk, scene.grow(sunk, -1)), scene.grow(rim, 1))
                scene.paint(cv2.bitwise_and(edge, lung), soft, opacity=0.6)

    scene.paint(scene.stroke(_ribs(), 0.05), soft + 0.3, softness=1.5, opacity=scene.between(0.16, 0.3))
    for side, sign in SIDES:
        lift = scene.between(-0.05, 0.03)
        curve = mirror([(0.08, -0.62), (0.3, -0.68 + lift), (0.5, -0.72 + lift), (0.78, -0.8 + lift)], sign)
        clavicle = scene.stroke([spline(curve, closed=False)], 0.07)
        scene.paint(clavicle, soft + 0.28, softness=1.5, opacity=0.55)
        scene.add(f"{side}_clavicle", clavicle)
    gas = scene.fill(blob(rng, scene.between(0.25, 0.5), 0.6, 0.13, 0.08, roughness=0.15))  # in the stomach
    scene.paint(gas, soft - 0.1, softness=3, opacity=0.7)
    places = rng.uniform((-0.75, -0.6), (0.75, 0.7), (rng.integers(0, 4), 2))
    if len(places):  # electrodes and their leads: round and dense like nodules, but sharp, and anywhere
        bends = places + rng.normal((0, -0.5), (0.2, 0), places.shape)
        ends = rng.normal((0, -1.3), (0.5, 0), places.shape)
        scene.paint(scene.stroke(spline(np.stack([places, bends, ends], 1), closed=False), 0.008), 0.95, opacity=0.7)
        scene.paint(scene.fill_all([ellipse(x, y, 0.045, 0.045) for x, y in places]), 0.98)
        scene.paint(scene.fill_all([ellipse(x, y, 0.02, 0.02) for x, y in places]), 0.6)
    if scene.chance(0.4):  # a skin fold or nipple shadow outside the lungs
        shadow = scene.lump(cv2.subtract(body, scene.grow(both, 4)), 0.06)
        scene.paint(shadow, soft + 0.3, softness=1.5, opacity=0.6)
    scene.soften()
    scene.image += 0.015 * scene.grain(2.5) + 0.015 * scene.grain()


def abdominal_ct(scene: Scene, lesions: tuple[str, ...]) -> None:
    """An axial slice at the kidneys in a soft-tissue window."""
    rng = scene.rng
    contrast = scene.between(0.0, 0.14)  # how far the contrast agent has come
    fat, muscle = scene.between(0.2, 0.27), 0.5
    table = spline([(-1.0, 0.72), (-0.5, 0.8), (0, 0.83), (0.5, 0.8), (1.0, 0.72)], closed=False)
    scene.paint(scene.stroke([table], 0.03), 0.4)
    rim = scene.between(0.03, 0.12)
    scene.paint(scene.fill(blob(rng, 0, 0.02, 0.93, 0.73, roughness=0.012)), 0.5)
    scene.paint(scene.fill(ellipse(0, 0.02, 0.915, 0.715)), fat)
    scene.paint(scene.fill(blob(rng, 0, 0.02, 0.92 - rim, 0.715 - rim, roughness=0.01)), muscle)
    cavity = scene.fill(blob(rng, 0, -0.06, 0.85 - rim, 0.58 - rim, roughness=0.015))
    scene.paint(cavity, fat + 0.03, softness=1.5)
    wide, high = 0.88 - rim, 0.65 - rim
    turns = 2 * np.pi * (np.arange(12) + 0.5 + rng.uniform(-0.2, 0.2, 12)) / 12
    ribs = [ellipse(wide * np.cos(t), high * np.sin(t), 0.07, 0.022, t + np.pi / 2 + 0.2) for t in turns]
    scene.paint(scene.fill_all(ribs), 0.9)
    jitter = functools.partial(rng.normal, 0, 0.012)

    for side, sign in SIDES:
        back = blob(rng, sign * 0.21, 0.5, 0.17, 0.1, roughness=0.08)
        scene.organ(f"{side}_autochthon", back, muscle + 0.02 * contrast)
        scene.organ(f"{side}_psoas_muscle", blob(rng, sign * 0.2, 0.3, 0.075, 0.1, roughness=0.06), muscle)
    spine_body = scene.fill(blob(rng, 0, 0.27, 0.135, 0.11, roughness=0.03))
    bone = cv2.bitwise_or(spine_body, scene.stroke([np.array(part) for part in _ARCH], 0.05))
    scene.paint(bone, 0.93)
    scene.paint(scene.grow(spine_body, -2), 0.75, mottle=(0.1, 30))
    canal = scene.fill(blob(rng, 0, 0.415, 0.06, 0.05, roughness=0.04))
    scene.paint(canal, 0.45)
    scene.add("vertebra", cv2.bitwise_or(bone, canal))
    scene.add("vertebral_body", spine_body)
    scene.add("spinal_canal", canal)

    missing = SIDES[rng.integers(2)][0] if scene.chance(0.08) else ""  # a kidney that was taken out
    kidneys, pelvises = {}, {}
    for side, sign in SIDES:
        if side == missing:
            continue
        lower = 0.03 * (side == "right")
        kidneys[side] = scene.fill(spline(mirror(np.array(_KIDNEY) + jitter((8, 2)) + (0, lower), sign)))
        pelvises[side] = scene.fill(blob(rng, sign * 0.45, 0.26 + lower, 0.06, 0.05, roughness=0.3), kidneys[side])
        scene.paint(kidneys[side], 0.56 + 1.9 * contrast)
        scene.paint(pelvises[side], fat + 0.08 if contrast < 0.08 else 0.55)
        scene.add(f"{side}_kidney", kidneys[side])
        scene.add(f"{side}_renal_pelvis", pelvises[side])
    both = functools.reduce(cv2.bitwise_or, kidneys.values())
    if not missing:
        scene.add("kidney", both)
    room = cv2.subtract(cavity, scene.grow(both, 1))  # the fat around a kidney keeps its neighbours away

    walls, contents = [], ([], [])  # loops of bowel, some with gas: round like cysts and tumours, outside the organs
    for x, y in rng.uniform((-0.3, -0.42), (0.5, 0.15), (rng.integers(8, 14), 2)):
        r = scene.between(0.06, 0.1)
        walls.append(blob(rng, x, y, r, r * 0.8, roughness=0.12))
        contents[int(scene.chance(0.4))].append((walls[-1] - (x, y)) * 0.7 + (x, y))
    for loops, gray in ((walls, 0.5), (contents[0], 0.42), (contents[1], 0.06)):
        scene.paint(scene.fill_all(loops, room), gray)
    outline = (np.array(_LIVER) + jitter((len(_LIVER), 2))) * (1, scene.between(0.85, 1.08))
    liver = scene.organ("liver", spline(outline), 0.56 + 0.7 * contrast, within=room)
    start = np.array([-0.2, -0.12]) + rng.normal(0, 0.06, (5, 2))
    course = [start, start + rng.normal((-0.14, -0.08), 0.06, (5, 2)), start + rng.normal((-0.28, -0.1), 0.12, (5, 2))]
    vessels = scene.stroke(spline(np.stack(course, 1), closed=False), 0.025)
    scene.paint(cv2.bitwise_and(vessels, liver), 0.58 + 1.2 * contrast, opacity=0.8)
    stomach = scene.organ("stomach", spline(np.array(_STOMACH) + 1.5 * jitter((6, 2))), 0.5, within=room)
    scene.paint(scene.grow(stomach, -2), 0.4, mottle=(0.05, 12))
    above = np.array([(-1, -1), (1, -1), (1, -0.32), (-1, -0.32)])
    scene.paint(scene.fill(above, scene.grow(stomach, -2)), 0.02)  # the air over the fluid's level
    scene.organ("spleen", spline(np.array(_SPLEEN) + jitter((6, 2))), 0.57 + 0.8 * contrast, within=room)
    course = spline(np.array(_PANCREAS) + jitter((5, 2)), closed=False)
    pancreas = cv2.bitwise_and(scene.stroke([course], scene.between(0.07, 0.1)), room)
    scene.paint(pancreas, 0.5 + 0.4 * contrast, mottle=(0.05, 40))
    scene.add("pancreas", pancreas)
    tissue = cv2.subtract(liver, pancreas)  # where the liver is seen
    if scene.chance(0.7):
        gallbladder = scene.organ("gallbladder", blob(rng, -0.24, -0.16, 0.09, 0.07, roughness=0.06, angle=0.6), 0.4)
        tissue = cv2.subtract(tissue, scene.grow(gallbladder, 3))
    scene.organ("aorta", blob(rng, 0.05, 0.11, 0.058, 0.058, roughness=0.03), 0.52 + 2.6 * contrast)
    scene.organ("inferior_vena_cava", blob(rng, -0.12, 0.12, 0.072, 0.05, roughness=0.06), 0.52 + 1.4 * contrast)

    for lesion in lesions:
        side = list(kidneys)[rng.integers(len(kidneys))]
        cortex = scene.free(cv2.subtract(kidneys[side], pelvises[side]))
        if lesion == "liver_tumor":
            for _ in range(rng.integers(1, 3)):
                tumor = scene.lump(scene.free(tissue), scene.between(0.07, 0.14), roughness=0.2)
                scene.paint(tumor, 0.46, softness=2, mottle=(0.06, 30))
                scene.add(lesion, tumor)
        elif lesion == "liver_cyst":
            cyst = scene.lump(scene.free(tissue), scene.between(0.06, 0.11), roughness=0.03)
            scene.paint(cyst, 0.36)
            scene.add(lesion, cyst)
        elif lesion == "kidney_stone":
            stone = scene.lump(scene.free(pelvises[side]), 0.028, roughness=0.2)
            scene.paint(stone, 1.0)
            scene.add(lesion, stone, f"{side}_kidney")
        else:
            benign = lesion == "kidney_cyst"
            growth = scene.lump(cortex, scene.between(0.055, 0.08), roughness=0.03 if benign else 0.2)
            scene.paint(growth, 0.38 if benign else 0.5, mottle=(0.08, 40))
            scene.add(lesion, growth, f"{side}_kidney")
    scene.soften()
    scene.image += 0.02 * scene.grain(1.0) + 0.02 * scene.grain()
    np.clip((scene.image - scene.between(0.0, 0.12)) * scene.between(1.0, 1.2), 0, 1, out=scene.image)


def brain_mri(scene: Scene, lesions: tuple[str, ...]) -> None:
    """An axial slice at the thalami, T1-, T2-weighted or FLAIR, with a coil's bias field."""
    rng = scene.rng
    weighting = ("t1", "t2", "flair")[rng.integers(3)]
    grays = {"t1": (0.68, 0.5, 0.1, 0.9), "t2": (0.38, 0.54, 0.82, 0.7), "flair": (0.42, 0.54, 0.08, 0.7)}
    white, gray, fluid, fat = grays[weighting]
    dark = weighting == "t1"  # whether a diseased place is darker than healthy tissue, or brighter
    wide = scene.between(0.94, 1.04)
    head = scene.fill(blob(rng, 0, 0, 0.74 * wide, 0.92, roughness=0.012))
    scene.paint(head, fat)
    scene.paint(scene.fill(blob(rng, 0, 0, 0.7 * wide, 0.88, roughness=0.006)), 0.06)
    inside = scene.fill(ellipse(0, 0, 0.66 * wide, 0.83))
    scene.paint(inside, fluid)
    brain = scene.fill(blob(rng, 0, 0, 0.635 * wide, 0.8, roughness=0.02, harmonics=(12, 22), points=160), inside)
    scene.paint(brain, gray)
    depth = scene.between(0.83, 0.87)
    folded = blob(rng, 0, 0, 0.61 * wide * depth, 0.77 * depth, roughness=0.09, harmonics=(14, 26), points=240)
    white_matter = scene.fill(folded, brain)
    scene.paint(white_matter, white)
    t = np.linspace(0, 2 * np.pi, 34, endpoint=False) + rng.uniform(-0.08, 0.08, 34)
    rays = np.stack([0.66 * wide * np.cos(t), 0.83 * np.sin(t)], 1)
    bends = rays * 0.92 + rng.normal(0, 0.025, (34, 2))
    sulci = spline(np.stack([rays, bends, rays * rng.uniform(0.74, 0.88, (34, 1))], 1), closed=False)
    banks = cv2.bitwise_and(scene.stroke(sulci, 0.055), brain)
    scene.paint(banks, gray, opacity=0.9)
    scene.paint(cv2.bitwise_and(scene.stroke(sulci, 0.014), brain), fluid, opacity=0.85)
    bends = rng.normal(0, 0.01, 2)
    front = spline([(0, -0.84), (bends[0], -0.55), (0, -0.34)], closed=False)
    back = spline([(0, 0.84), (bends[1], 0.6), (0, 0.42)], closed=False)
    scene.paint(scene.stroke([front, back], 0.02), fluid)
    scene.add("head", head)
    scene.add("brain", brain)

    hemispheres = {}
    others = banks  # what is neither white matter nor a place of lesions
    s = scene.between(0.8, 1.6)  # wide ventricles, as in old age
    for side, sign in SIDES:
        hemispheres[side] = scene.fill(half_plane(0, sign), brain)
        scene.add(f"{side}_cerebral_hemisphere", hemispheres[side])
        sylvian = spline(mirror([(0.57, -0.02), (0.5, 0.0), (0.42, -0.06), (0.4, 0.1)], sign), closed=False)
        scene.paint(scene.stroke([sylvian], 0.05), gray)
        scene.paint(scene.stroke([sylvian], 0.018), fluid)
        putamen = scene.fill(blob(rng, sign * 0.27, -0.03, 0.06, 0.14, roughness=0.08, angle=sign * 0.3))
        scene.paint(putamen, gray, softness=1.5)
        outline = blob(rng, sign * 0.16, -0.24, 0.055, 0.075, roughness=0.05)
        caudate = scene.organ(f"{side}_caudate_nucleus", outline, gray)
        outline = blob(rng, sign * 0.11, 0.05, 0.085, 0.125, roughness=0.05, angle=-sign * 0.4)
        thalamus = scene.organ(f"{side}_thalamus", outline, gray + 0.03, softness=1.5)
        tip = 0.05 + 0.05 * s
        horn = [(0.02, -0.16), (0.025, -0.3), (tip, -0.35), (tip, -0.28), (0.035 + 0.03 * s, -0.15)]
        atrium = [(0.13, 0.18), (0.18 + 0.04 * s, 0.2), (0.2 + 0.06 * s, 0.4), (0.17, 0.46), (0.15, 0.3)]
        ventricle = scene.fill_all([spline(mirror(part, sign)) for part in (horn, atrium)])
        scene.paint(ventricle, fluid)
        scene.add(f"{side}_lateral_ventricle", ventricle)
        hemispheres[side] = cv2.subtract(hemispheres[side], scene.grow(ventricle, 1))
        others = functools.reduce(cv2.bitwise_or, (putamen, caudate, thalamus), others)
    scene.paint(scene.fill(ellipse(0, 0.05, 0.012 * s, 0.1)), fluid)
    if scene.chance(0.3):  # the pineal gland's calcification, a normal find
        scene.paint(scene.fill(blob(rng, 0, 0.22, 0.02, 0.025)), 0.02)

    for lesion in lesions:
        side = SIDES[rng.integers(2)][0]
        tissue, parent = scene.free(hemispheres[side]), f"{side}_cerebral_hemisphere"
        if lesion == "brain_tumor":
            whole = scene.lump(tissue, scene.between(0.2, 0.28), roughness=0.2)
            scene.paint(whole, 0.36 if dark else 0.85, softness=2, opacity=0.85)
            scene.add(lesion, whole, parent)
            core = scene.lump(whole, scene.between(0.1, 0.13), roughness=0.15)
            scene.paint(core, 0.98 if dark else 0.6)
            scene.paint(scene.grow(core, -3), 0.18 if dark else 0.95)
            scene.add("tumor_core", core, lesion)
        elif lesion == "infarct":
            region = scene.lump(tissue, scene.between(0.16, 0.24), roughness=0.22)
            scene.paint(region, 0.3 if dark else 0.88, softness=1, opacity=0.9, mottle=(0.03, 24))
            scene.add(lesion, region, parent)
        else:
            tissue = cv2.subtract(cv2.bitwise_and(tissue, white_matter), others)
            for _ in range(rng.integers(1, 4)):
                spot = scene.lump(scene.free(tissue), scene.between(0.03, 0.06), roughness=0.25)
                scene.paint(spot, 0.33 if dark else 0.92)
                scene.add(lesion, spot, parent)
    scene.soften()
    scene.texture(head, 0.02, 1.0)
    scene.image *= 1 + 0.1 * scene.field(3)
    scene.image += 0.025 * scene.grain()
    np.abs(scene.image, out=scene.image)  # the scanner stores magnitudes

"""The colours of phrases in pictures, the same in every one."""

Color = tuple[int, int, int]  # red, green, blue, 0 to 255

# Okabe and Ito's colours, which the colour-blind can tell apart, without black; then lighter ones of Paul Tol.
PALETTE: tuple[Color, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (204, 121, 167),
    (0, 114, 178),
    (187, 204, 51),
    (255, 170, 187),
    (68, 187, 153),
    (238, 136, 102),
    (153, 221, 255),
)

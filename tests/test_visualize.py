"""Pictures: the right pixels in the right colours, and the photo left as it was."""

import numpy as np
import pytest
import torch

from transfiner_refine import canvas, visualize
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.types import Instances, LevelNodes, RefineDetails

HEIGHT, WIDTH = 60, 90
SCALE = 10  # of a panel of this photo


@pytest.fixture
def photo(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def square(top: int, left: int, bottom: int, right: int) -> torch.Tensor:
    mask = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    mask[:, top:bottom, left:right] = True
    return mask


def instances(masks: torch.Tensor, roi: tuple[float, ...] = (0, 0, WIDTH, HEIGHT), details: bool = True, **parts):
    """Instances that share one RoI, with an empty quadtree unless ``parts`` say otherwise."""
    count = len(masks)
    boxes = torch.tensor([roi]).float().expand(count, 4)
    parts = {"incoherence": torch.zeros(count, 28, 28), "quadtree": (), "node_probs": ()} | parts
    found = RefineDetails(coarse_probs=torch.zeros(count, 28, 28), **parts) if details else None
    return Instances(boxes=boxes, masks=masks, image_size=(HEIGHT, WIDTH), rois=boxes, details=found)


def nodes_of(row: list[int], col: list[int], side: int, roi: list[int] | None = None) -> LevelNodes:
    count = len(row)
    index = torch.tensor(roi or [0] * count, dtype=torch.long)
    parent = torch.zeros(count, dtype=torch.long)
    return LevelNodes(index, torch.tensor(row).long(), torch.tensor(col).long(), parent, torch.zeros(count), side)


def panel(picture: np.ndarray) -> np.ndarray:
    """Cut the photo out of a picture with a frame and a caption."""
    return picture[canvas.MARGIN :, canvas.MARGIN :][: HEIGHT * SCALE, : WIDTH * SCALE]


class TestDrawMasks:
    def test_only_the_mask_is_coloured(self, photo: np.ndarray):
        before = photo.copy()
        picture = visualize.draw_masks(photo, square(20, 20, 40, 50), fill=1.0)
        assert np.array_equal(photo, before)
        assert picture.shape == photo.shape and picture.dtype == np.uint8
        assert (picture[25:35, 25:45] == visualize.INSTANCE_COLORS[0]).all()
        outside = np.ones((HEIGHT, WIDTH), bool)
        outside[15:45, 15:55] = False
        assert np.array_equal(picture[outside], photo[outside])

    def test_the_outline_follows_the_enlarged_mask(self, photo: np.ndarray):
        picture = visualize.draw_masks(photo, square(20, 20, 40, 50), fill=0, scale=4)
        plain = visualize.draw_masks(photo, square(0, 0, 0, 0), fill=0, scale=4)
        assert picture.shape == (4 * HEIGHT, 4 * WIDTH, 3)
        rows, columns = np.nonzero((picture != plain).any(axis=2))
        reach = 3  # half a line and its rim
        assert abs(rows.min() - 80) <= reach and abs(rows.max() - 159) <= reach
        assert abs(columns.min() - 80) <= reach and abs(columns.max() - 199) <= reach
        assert np.array_equal(picture[90:150, 90:190], plain[90:150, 90:190])

    def test_instances_differ_in_colour(self, photo: np.ndarray):
        masks = torch.cat([square(5, 5, 25, 25), square(30, 50, 55, 80)])
        picture = visualize.draw_masks(photo, masks, fill=1.0)
        assert tuple(picture[15, 15]) == visualize.INSTANCE_COLORS[0]
        assert tuple(picture[40, 65]) == visualize.INSTANCE_COLORS[1]

    def test_probabilities_count_from_a_half(self, photo: np.ndarray):
        mask = square(20, 20, 40, 50)
        probabilities = torch.where(mask, 0.5, 0.49)
        assert np.array_equal(visualize.draw_masks(photo, probabilities), visualize.draw_masks(photo, mask))
        assert np.array_equal(visualize.draw_masks(photo, mask.numpy()), visualize.draw_masks(photo, mask))

    def test_a_border_is_no_outline(self, photo: np.ndarray):
        everything = square(0, 0, HEIGHT, WIDTH)
        assert np.array_equal(visualize.draw_masks(photo, everything, fill=0), photo)

    def test_no_masks_leave_the_photo(self, photo: np.ndarray):
        assert np.array_equal(visualize.draw_masks(photo, np.zeros((0, HEIGHT, WIDTH), bool)), photo)

    @pytest.mark.parametrize("shape", [(1, WIDTH, HEIGHT), (HEIGHT, WIDTH)])
    def test_masks_of_another_size_are_refused(self, photo: np.ndarray, shape: tuple[int, ...]):
        with pytest.raises(InvalidInputError, match=r"expected masks of shape \(N, 60, 90\)"):
            visualize.draw_masks(photo, np.zeros(shape, bool))

    @pytest.mark.parametrize("image", [np.zeros((3, 4, 3)), np.zeros((3, 4), np.uint8), torch.zeros(3, 4, 3)])
    def test_another_kind_of_photo_is_refused(self, image):
        with pytest.raises(InvalidInputError, match="expected the photo as numpy"):
            visualize.draw_masks(image, np.zeros((0, 3, 4), bool))


class TestBeforeAfter:
    def test_both_sides_show_their_masks(self, photo: np.ndarray):
        coarse, refined = square(20, 20, 40, 50), square(22, 20, 40, 50)
        picture = visualize.before_after(photo, instances(coarse), instances(refined), zooms=0)
        top = canvas.MARGIN + canvas.BAR
        left = picture[top : top + HEIGHT * SCALE, canvas.MARGIN :][:, : WIDTH * SCALE]
        right = picture[top : top + HEIGHT * SCALE, canvas.MARGIN * 2 + WIDTH * SCALE :][:, : WIDTH * SCALE]
        assert np.array_equal(left, visualize.draw_masks(photo, coarse, scale=SCALE))
        assert np.array_equal(right, visualize.draw_masks(photo, refined, scale=SCALE))

    def test_what_changed_is_enlarged_and_marked(self, photo: np.ndarray):
        coarse, refined = square(20, 20, 40, 50), square(20, 20, 40, 52)
        plain = visualize.before_after(photo, instances(coarse), instances(refined), zooms=0)
        zoomed = visualize.before_after(photo, instances(coarse), instances(refined))
        assert zoomed.shape[0] > plain.shape[0] and zoomed.shape[1] == plain.shape[1]
        marks = (zoomed[: plain.shape[0] - canvas.MARGIN] != plain[: -canvas.MARGIN]).any(axis=2)
        rows, columns = np.nonzero(marks[:, : plain.shape[1] // 2])
        corner = canvas.MARGIN, canvas.MARGIN + canvas.BAR
        assert columns.min() - corner[0] < 50 * SCALE and columns.max() - corner[0] > 52 * SCALE
        assert rows.min() - corner[1] < 21 * SCALE and rows.max() - corner[1] > 39 * SCALE

    def test_without_change_nothing_is_enlarged(self, photo: np.ndarray):
        same = instances(square(20, 20, 40, 50))
        plain = visualize.before_after(photo, same, same, zooms=0)
        assert np.array_equal(visualize.before_after(photo, same, same), plain)

    def test_no_instances(self, photo: np.ndarray):
        none = instances(torch.zeros(0, HEIGHT, WIDTH, dtype=torch.bool))
        assert visualize.before_after(photo, none, none).dtype == np.uint8

    def test_other_sizes_and_numbers_are_refused(self, photo: np.ndarray):
        one, two = instances(square(0, 0, 9, 9)), instances(square(0, 0, 9, 9).repeat(2, 1, 1))
        for image, refined in ((photo, two), (photo[:-1], one)):
            with pytest.raises(InvalidInputError, match="expected as many coarse as refined instances"):
                visualize.before_after(image, one, refined)

    @pytest.mark.parametrize("size", [(1, 1), (5, 400), (2000, 30)])
    def test_photos_of_any_size(self, size: tuple[int, int]):
        masks = torch.zeros(1, *size, dtype=torch.bool)
        empty = Instances(boxes=torch.tensor([[0, 0, 1, 1]]), masks=masks, image_size=size)
        full = Instances(boxes=torch.tensor([[0, 0, 1, 1]]), masks=~masks, image_size=size)
        assert visualize.before_after(np.zeros((*size, 3), np.uint8), empty, full).ndim == 3


class TestCloseUps:
    def test_left_is_coarse_and_right_is_refined(self, photo: np.ndarray):
        coarse, refined = square(20, 20, 40, 50), square(20, 20, 40, 52)
        picture = visualize.close_ups(photo, instances(coarse), instances(refined), zooms=1)
        tile = canvas.MIN_WIDTH
        assert picture.shape == (canvas.BAR + tile + canvas.MARGIN, 2 * tile + 3 * canvas.MARGIN, 3)
        left, right = (
            picture[canvas.BAR : canvas.BAR + tile, start : start + tile]
            for start in (canvas.MARGIN, 2 * canvas.MARGIN + tile)
        )
        changed = (left != right).any(axis=2)
        assert changed.any() and not changed[:, [0, -1]].any()
        same = visualize.close_ups(photo, instances(coarse), instances(coarse), zooms=1)
        assert same.shape == picture.shape, "without a change the middle of the photo is shown"

    def test_other_numbers_are_refused(self, photo: np.ndarray):
        one, two = instances(square(0, 0, 9, 9)), instances(square(0, 0, 9, 9).repeat(2, 1, 1))
        with pytest.raises(InvalidInputError, match="expected as many coarse as refined instances"):
            visualize.close_ups(photo, one, two)


class TestDrawIncoherence:
    def test_a_cell_is_drawn_where_it_lies(self, photo: np.ndarray):
        roi = (17.0, 2.0, 73.0, 58.0)  # 28 cells of 2 pixels
        maps = torch.zeros(1, 28, 28)
        maps[0, 3, 10] = 1
        marked = visualize.draw_incoherence(photo, instances(square(0, 0, 9, 9), roi, incoherence=maps))
        plain = visualize.draw_incoherence(photo, instances(square(0, 0, 9, 9), roi))
        expected = np.zeros((HEIGHT * SCALE, WIDTH * SCALE), bool)
        expected[8 * SCALE : 10 * SCALE, 37 * SCALE : 39 * SCALE] = True
        assert np.array_equal((panel(marked) != panel(plain)).any(axis=2), expected)

    def test_a_roi_may_cross_the_border_or_lie_outside(self, photo: np.ndarray):
        mask = square(0, 0, 9, 9)
        plain = panel(visualize.draw_incoherence(photo, instances(mask)))
        ones = torch.ones(1, 28, 28)
        crossing = visualize.draw_incoherence(photo, instances(mask, (-28, -28, 28, 28), incoherence=ones))
        changed = (panel(crossing) != plain).any(axis=2)
        assert changed[: 28 * SCALE, : 28 * SCALE].all() and changed.sum() == (28 * SCALE) ** 2
        outside = visualize.draw_incoherence(photo, instances(mask, (200, 200, 256, 256), incoherence=ones))
        assert np.array_equal(panel(outside), plain)

    def test_of_several_instances_the_most_incoherent_counts(self, photo: np.ndarray):
        masks = square(0, 0, 9, 9).repeat(2, 1, 1)
        maps = torch.stack([torch.full((28, 28), 0.9), torch.full((28, 28), 0.2)])
        both = visualize.draw_incoherence(photo, instances(masks, incoherence=maps))
        first = visualize.draw_incoherence(photo, instances(masks[:1], incoherence=maps[:1]))
        assert np.array_equal(both, first)

    def test_details_are_needed(self, photo: np.ndarray):
        for draw in (visualize.draw_incoherence, visualize.draw_quadtree):
            with pytest.raises(InvalidInputError, match="return_quadtree=True"):
                draw(photo, instances(square(0, 0, 9, 9), details=False))


class TestDrawQuadtree:
    def draw(self, photo: np.ndarray, *levels: LevelNodes, rois: list[tuple[float, ...]]) -> np.ndarray:
        masks = torch.zeros(len(rois), HEIGHT, WIDTH, dtype=torch.bool)
        probs = tuple(torch.ones(len(level)) for level in levels)
        details = RefineDetails(torch.zeros(len(rois), 28, 28), levels, torch.zeros(len(rois), 28, 28), probs)
        boxes = torch.tensor(rois).float().reshape(-1, 4)
        found = Instances(boxes=boxes, masks=masks, image_size=(HEIGHT, WIDTH), rois=boxes, details=details)
        return visualize.draw_quadtree(photo, found)

    def test_nodes_cover_their_cells_as_drawn_one_by_one(
        self, photo: np.ndarray, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(visualize, "QUADTREE_SIDE", WIDTH * SCALE)
        rois = [(10.0, -20.0, 66.0, 36.0), (40.0, 30.0, 96.0, 86.0)]  # 28 cells of 2 pixels, both cross the border
        row, col, roi = (rng.integers(0, high, 40).tolist() for high in (28, 28, 2))
        picture = panel(self.draw(photo, nodes_of(row, col, 28, roi), rois=rois))
        plain = panel(self.draw(photo, nodes_of([], [], 28), rois=rois))
        expected = np.zeros((HEIGHT * SCALE, WIDTH * SCALE), bool)
        for r, c, index in zip(row, col, roi, strict=True):
            left, top = (round((rois[index][axis] + 2 * cell) * SCALE) for axis, cell in ((0, c), (1, r)))
            if left < WIDTH * SCALE and top < HEIGHT * SCALE:
                # The line around a node lies one pixel beyond its right and lower side.
                expected[max(0, top) : max(0, top + 21), max(0, left) : max(0, left + 21)] = True
        assert np.array_equal((picture != plain).any(axis=2), expected)

    def test_levels_differ_in_colour_and_size(self, photo: np.ndarray):
        grey = np.full_like(photo, 128)
        roi = [(0.0, 0.0, 56.0, 56.0)]
        picture = self.draw(grey, nodes_of([5], [5], 28), nodes_of([10], [10], 56), rois=roi)
        scale = round(visualize.QUADTREE_SIDE / WIDTH)
        cells = picture[canvas.MARGIN :, canvas.MARGIN :][10 * scale : 12 * scale, 10 * scale : 12 * scale]
        child, rest = cells[scale // 2, scale // 2].astype(int), cells[-scale // 2, -scale // 2].astype(int)
        blue, sky = np.array(visualize.LEVEL_COLORS[0]), np.array(visualize.LEVEL_COLORS[1])
        assert abs(rest - blue).sum() < abs(rest - sky).sum()
        assert abs(child - sky).sum() < abs(rest - sky).sum()

    def test_neither_nodes_nor_levels_nor_instances(self, photo: np.ndarray):
        for levels, rois in (((), [(0.0, 0.0, 9.0, 9.0)]), ((nodes_of([], [], 28),), [])):
            assert self.draw(photo, *levels, rois=rois).dtype == np.uint8

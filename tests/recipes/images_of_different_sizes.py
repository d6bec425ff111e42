"""Your own images, of different sizes, in one folder per class: each is scaled and cropped to `size`."""

from pathlib import Path

from PIL import Image, ImageDraw

from fastrbn import AvgStatsCallback, accuracy, conv_rbn, get_learn_run, image_databunch, load_folder

for n in range(80):  # stands for your photos
    shape = ("disc", "cross")[n % 2]
    width, height = 24 + n % 7, 24 + n % 5
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    if shape == "disc":
        draw.ellipse([4, 4, width - 5, height - 5], fill="black")
    else:
        draw.line([4, 4, width - 5, height - 5, width - 5, 4, 4, height - 5], fill="black", width=3)
    Path("photos", shape).mkdir(parents=True, exist_ok=True)
    image.save(f"photos/{shape}/{n}.png")

data = image_databunch(load_folder("photos", size=24), bs=8)
learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[AvgStatsCallback(accuracy)])
run.fit(2, learn)

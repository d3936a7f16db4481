r"""
One start and everything measured on it, in one process: OMP_NUM_THREADS=1 python run.py SEED [tiny]

Writes starts/SEED/{log.txt, names.pt, small.pt, base.pt, llava, guides} and rows/SEED.json. What is finished is not done again.
"""

import sys, time
from pathlib import Path
import compare, guides, starts
from compare import LlavaForConditionalGeneration

seed = int(sys.argv[1])
tiny = "tiny" in sys.argv
root = Path(__file__).parent / ("tiny" if tiny else ".")
if tiny:
    starts.STAGES = {"names": (4, 2, 2, 0), "small": (2, 2, 2, 2), "base": (4, 2, 2, 2)}
    guides.STEPS, guides.SCENES, compare.TEST_SCENES = 2, 1, 2
folder = root / "starts" / str(seed)
rows = root / "rows" / f"{seed}.json"
rows.parent.mkdir(parents=True, exist_ok=True)
clock = time.process_time()


def tell(what):
    print(f"== {what}: {time.process_time() - clock:.0f} CPU seconds so far", flush=True)


if not (folder / "llava").exists():
    starts.main(seed, folder)
tell("start")
model = LlavaForConditionalGeneration.from_pretrained(folder / "llava").eval().requires_grad_(False)
for teacher in guides.TEACHERS:
    if not (folder / "guides" / teacher / "config.json").exists():
        guides.train_guide(model, seed, teacher, folder, guides.STEPS)
tell("guides")
compare.main(seed, folder, rows, "--guides")
tell("all")

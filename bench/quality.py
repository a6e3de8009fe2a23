"""What the embedded models obey: 90 text-to-video prompts and 60 images, 30 and 20 of held-out combinations.

script/bench quality [--task t2v|i2v] [--sheet FOLDER]
"""

import argparse
import time
from pathlib import Path

from tiny import world
from tiny.evaluate import contact_sheet, evaluate, load_generator, summarise

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = {"t2v": {"trained": 60, "held_out": 30}, "i2v": {"trained": 40, "held_out": 20}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench quality", description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=list(SAMPLES), action="append")
    parser.add_argument("--weights", type=Path, default=ROOT / "weights", help="folder of tiny-t2v, tiny-i2v")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--sheet", type=Path, help="folder for contact sheets of the results")
    options = parser.parse_args()
    for task in options.task or list(SAMPLES):
        generator = load_generator(options.weights / f"tiny-{task}")
        started, results = time.perf_counter(), []
        settings = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
        for result in evaluate(generator, task, **SAMPLES[task], **settings):
            results.append(result)
        seconds = (time.perf_counter() - started) / len(results)
        print(f"\n{task}: {len(results)} clips, {seconds:.2f} s each, {settings}")
        groups = {
            "all": results,
            "trained": [r for r in results if not world.is_held_out(r.asked)],
            "held out": [r for r in results if world.is_held_out(r.asked)],
        }
        columns = list(summarise(results))
        print(f"{'':10}" + "".join(f"{name:>12}" for name in columns))
        for name, group in groups.items():
            values = summarise(group)
            cells = (f"{v:12.1f}" if k == "psnr" else f"{100 * v:11.1f}%" for k, v in values.items())
            print(f"{name:10}" + "".join(cells))
        wrong = [r for r in results if not all(r.agreement.values())]
        for result in wrong:
            failed = ", ".join(
                f"{k} is {getattr(result.verdict, k)}" for k, ok in result.agreement.items() if not ok
            )
            print(f"  wrong: {result.prompt!r}: {failed}")
        if options.sheet:
            options.sheet.mkdir(parents=True, exist_ok=True)
            contact_sheet(results[::6], options.sheet / f"{task}.png")
            if wrong:
                contact_sheet(wrong[:15], options.sheet / f"{task}-wrong.png")


if __name__ == "__main__":
    main()

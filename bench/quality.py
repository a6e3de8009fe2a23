"""How often the embedded models follow 90 text-to-video prompts and 60 images, 30 and 20 of them held out.

And what tiny-caption sees in 200 rendered clips, and in 90 of tiny-t2v's compared with the judge.

script/bench quality [--task t2v|i2v|caption] [--sheet FOLDER]

With --speed, the levels side by side on the same clips: how often each follows the prompt, its distance from
the exact clips, and its time; --fewer adds exact clips with that many steps. These are the tables of
docs/speed.md:

script/bench quality --speed balanced --speed fast --fewer 26 --fewer 12 --docs docs/speed.md
script/bench quality --speed balanced --speed fast --fewer 12 --task t2v --scheduler dpm --docs docs/speed.md
"""

import argparse
import tempfile
import time
from pathlib import Path

from bench import _levels
from bench._arguments import at_least_one
from lib.generation.step_schedule import SPEEDS
from lib.video.writer import write_video
from tiny import evaluate_captions, world
from tiny.evaluate import contact_sheet, evaluate, load_generator, summarise

ROOT = Path(__file__).resolve().parent.parent
CAPTIONED = 200
SAMPLES = {"t2v": {"trained": 60, "held_out": 30}, "i2v": {"trained": 40, "held_out": 20}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench quality", description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=[*SAMPLES, "caption"], action="append")
    parser.add_argument("--weights", type=Path, default=ROOT / "weights", help="folder of tiny-t2v and so on")
    parser.add_argument("--steps", type=at_least_one, default=50)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--sheet", type=Path, help="folder for contact sheets of the results")
    parser.add_argument("--speed", choices=SPEEDS, action="append", help="compare with exact; repeatable")
    parser.add_argument("--fewer", type=int, action="append", default=[], help="exact with so many steps too")
    parser.add_argument("--scheduler", choices=["default", "ddim", "dpm"], default="default")
    parser.add_argument(
        "--clips", type=at_least_one, help="of each task, a third of them held out; by default all"
    )
    parser.add_argument("--docs", type=Path, help="file whose tables of levels are to be replaced")
    options = parser.parse_args()
    if options.docs:
        _levels.replace_table(options.docs, "step schedules", _levels.step_schedules())
    if options.speed:
        for task in options.task or SAMPLES:
            levels(task, options)
        return
    for task in options.task or [*SAMPLES, "caption"]:
        if task == "caption":
            captions(options.weights)
            continue
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


def levels(task: str, options: argparse.Namespace) -> None:
    """Make the same clips at every speed, print the table and put it into the docs."""
    variants = [_levels.Variant(speed="exact", steps=options.steps)]
    variants += [_levels.Variant(speed=s, steps=options.steps) for s in options.speed if s != "exact"]
    variants += [_levels.Variant(speed="exact", steps=steps) for steps in options.fewer]
    samples = SAMPLES[task]
    if options.clips:
        samples = {"trained": options.clips - options.clips // 3, "held_out": options.clips // 3}
    generator = load_generator(options.weights / f"tiny-{task}")
    settings = {"guidance_scale": options.guidance, "scheduler": options.scheduler}
    rows = _levels.compare(generator, task, variants, **samples, **settings)
    found = [[str(v), *_levels.cells(generator, v, row).values()] for v, row in rows.items()]
    title = f"`tiny-{task}`, {sum(samples.values())} clips"
    name = task
    if options.scheduler != "default":
        title, name = f"{title}, {options.scheduler}", f"{task} {options.scheduler}"
    table = _levels.markdown((title, *_levels.COLUMNS), found)
    print(table, flush=True)
    if options.docs:
        _levels.replace_table(options.docs, name, table)


def captions(weights: Path) -> None:
    """Caption rendered clips by each sampling, then caption and judge clips of tiny-t2v."""
    import torch

    from lib.caption.captioner import load_captioner

    captioner = load_captioner(weights / "tiny-caption", device="cpu", dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        clips = evaluate_captions.write_rendered_clips(Path(folder), CAPTIONED, seed=1)
        print(f"\ncaption: {len(clips)} rendered clips, H.264 of many sizes, rates and lengths")
        columns = [*evaluate_captions.ATTRIBUTE_NAMES, "all four"]
        print(f"{'':22}" + "".join(f"{name:>12}" for name in columns))
        for sampling in ("auto", "uniform", "base", "chat"):
            found = evaluate_captions.describe(captioner, clips, frame_sampling=sampling)
            _row(sampling, [each.agreement for each in found])
            if sampling == "auto":
                held_out = [each.agreement for each in found if world.is_held_out(each.asked)]
                _row("auto, held out", held_out)
                wrong = [each for each in found if not all(each.agreement.values())]
        results = list(evaluate(load_generator(weights / "tiny-t2v"), "t2v", **SAMPLES["t2v"]))
        made = []
        for index, result in enumerate(results):
            path = Path(folder) / f"made-{index}.mp4"
            write_video(result.frames, path, fps=world.FPS, format="mp4", metadata={})
            made.append((path, result.asked))
        print(f"clips of tiny-t2v: {len(made)}, against their prompts")
        _row("the judge", [result.agreement for result in results])
        _row("captions", [each.agreement for each in evaluate_captions.describe(captioner, made)])
    for each in wrong:
        print(f"  wrong: {each.text!r}: {each.asked}")


def _row(name: str, results: list[dict[str, bool]]) -> None:
    values = evaluate_captions.summarise(results)
    print(f"{name:22}" + "".join(f"{100 * value:11.1f}%" for value in values.values()))


if __name__ == "__main__":
    main()

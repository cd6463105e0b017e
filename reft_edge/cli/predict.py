"""Predict pictures, arrays and tables with the model that this device serves, or with any ONNX file.

FILE is a picture, a folder of pictures, an .npz with an array `inputs`, or a .csv with a header line. Files are read as
training data are: pictures are converted and resized to what the model takes; a .csv by the columns and windows in
[data] of the agent's settings. A file that cannot be read is told of, and the others are predicted; the exit code is 3
then, or 4 where it was the model that failed. A model that is deployed meanwhile takes over between two batches.

--json prints a line for each sample: file, sample (its index in an .npz or .csv), version, model, outputs and, of a
classifier, label, index and confidence; for a file that cannot be read: file and error.

examples:
  reft-edge predict picture.jpg                             with what agent.toml's device serves
  reft-edge predict pictures/ --json | jq -r .label
  reft-edge predict samples.npz --model global.onnx
  reft-edge predict today.csv --model /var/lib/reft-edge-agent/agent.toml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from reft_edge.agent.settings import AgentSettings, Limits
from reft_edge.cli.run_arguments import at_least_one
from reft_edge.errors import DataError, ModelError

if TYPE_CHECKING:
    from reft_edge.agent.serving.prediction import Prediction
    from reft_edge.agent.serving.samples import SampleBatch


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a picture, a folder, an .npz or a .csv")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("agent.toml"),
        metavar="MODEL",
        help="an agent.toml, an agent's spool or an .onnx file (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each sample")
    parser.add_argument(
        "--batch", type=at_least_one, default=32, metavar="N", help="samples at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=at_least_one, metavar="N", help="cores to compute on (default: all, at most 4)"
    )


def run(args: argparse.Namespace) -> int:
    from reft_edge.agent.serving.predictor import Predictor
    from reft_edge.agent.serving.samples import UnreadableFile, read_batches

    data = AgentSettings.read(args.model).data if args.model.suffix == ".toml" else None
    predicted, code = 0, 0
    failed: set[Path] = set()
    with Predictor(args.model, threads=args.threads or Limits().n_threads) as predictor:
        for batch in read_batches(args.files, predictor.served, batch_size=args.batch, data=data):
            try:
                if isinstance(batch, UnreadableFile):
                    raise DataError(batch.reason)
                prediction = predictor.predict(batch.inputs, by=batch.served, batch_size=args.batch)
            except (DataError, ModelError) as exc:
                code = code or exc.exit_code
                files = {batch.file} if isinstance(batch, UnreadableFile) else {each.file for each in batch.samples}
                failed |= files
                _tell_failure(files, str(exc), as_json=args.json)
                continue
            predicted += len(prediction)
            lines = _json_lines(batch, prediction) if args.json else _text_lines(batch, prediction)
            print("\n".join(lines), flush=True)
    if failed:
        _tell(f"samples predicted: {predicted}; files that failed: {len(failed)}")
    return code


def _json_lines(batch: SampleBatch, prediction: Prediction) -> Iterator[str]:
    for sample, row in zip(batch.samples, prediction.rows(), strict=True):
        place = {"file": str(sample.file)} | ({} if sample.index is None else {"sample": sample.index})
        yield _json({**place, "version": prediction.version, "model": prediction.model, **row})


def _text_lines(batch: SampleBatch, prediction: Prediction) -> Iterator[str]:
    confidence = prediction.confidence
    if confidence is None:
        for sample, outputs in zip(batch.samples, prediction.outputs, strict=True):
            yield f"{' '.join(f'{value:>10.6g}' for value in outputs.ravel().tolist())}  {sample}"
        return
    width = max(map(len, prediction.classes), default=5)
    for sample, label, share in zip(batch.samples, prediction.labels, confidence.tolist(), strict=True):
        yield f"{label:<{width}}  {share:6.1%}  {sample}"


def _tell_failure(files: AbstractSet[Path], reason: str, *, as_json: bool) -> None:
    for file in sorted(files):
        if as_json:
            print(_json({"file": str(file), "error": reason}), flush=True)
        else:
            _tell(reason if str(file) in reason else f"{file}: {reason}")


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _tell(text: str) -> None:
    print(f"reft-edge predict: {text}", file=sys.stderr, flush=True)

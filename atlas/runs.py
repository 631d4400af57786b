"""A run: its data, its folder, what it has learned, and how it goes on after a kill."""

import contextlib
import json
import resource
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from atlas import folder as folders
from atlas import parallel, results
from atlas.audio import build_audio_encoder, fingerprint
from atlas.clips import READERS
from atlas.config import load_config, run_name
from atlas.data import ClipDataset, PackedClips, loader, pack, swap_partners, to_device
from atlas.errors import AtlasError
from atlas.learner import Learner, compiled
from atlas.metrics import class_names, score_disjoint, score_tasks
from atlas.model import clip_losses, count_parameters, weighted
from atlas.protocols import PROTOCOLS, plan_of, sequence_of
from atlas.updates import Updates

SENSITIVITY_BATCH = 8  # clips whose gradients are formed side by side; S does not depend on it


class Run(Learner):
    """A Learner with data, tasks, results and a folder, which `open` makes."""

    def __init__(self, config):
        self.folder = Path(config.out_dir, run_name(config))
        self.journal = folders.Journal(self.folder)
        self.cache, self.audio_sha = parallel.in_turn(lambda: open_data(config))
        self.tasks = PROTOCOLS[config.protocol](self.cache, config)
        self.sequence = sequence_of(self.tasks, config)
        self.partners = swap_partners(self.cache, self.tasks)
        self.is_stream = config.protocol == "tfcl" and config.method != "joint"
        self.results = results.new_results(config, self.tasks, class_names(self.cache, self.tasks))
        self.drifts = self.results["drifts"]
        classes = [task.classes for task in self.tasks] if config.classify else None
        super().__init__(config, (self.cache.context_dim, self.cache.token_dim), classes)
        self.forward = compiled(self.model) if config.compile else self.model
        self.results |= self.about()
        self.learned = 0  # tasks whose checkpoints were there before

    def about(self):
        """What results.json says of the encoders, the model and the machine."""
        config, machine = self.config, results.environment()
        machine["device"] = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        machine["instructions"] = torch.backends.cpu.get_cpu_capability()
        machine |= {"threads": torch.get_num_threads(), "amp": self.amp}
        machine["processes"] = parallel.processes()
        audio = "none needed" if config.audio == "logmel" else config.audio_weights or "random"
        visual = {"source": str(config.visual_weights or "random"), "sha256": self.visual_sha}
        weights = {"visual": visual, "audio": {"source": str(audio), "sha256": self.audio_sha}}
        parameters = count_parameters(self.model)
        return {"weights": weights, "parameters": parameters, "environment": machine}

    def open(self, resume=False):
        """Take the folder, once nothing is wrong; with `resume`, go on from what it holds."""
        begun = resume and folders.is_used(self.folder)
        results.read_joint(self.config.joint_run, self.results["tasks"])
        first = None if begun else folders.first_task(self)
        if first:
            self.load(Path(self.config.first_task, "task_01"), with_method=False)
        self.lock = folders.take_folder(self.folder, self.config, resume)
        parallel.wait()
        if begun:
            self.recover()
        else:
            folders.write_config(self.folder, self.config)
        if first:
            self.reuse(first)
        parallel.wait()

    def reuse(self, first):
        """Save the first task of another run, which is loaded, as if it had been learned here."""
        plan = plan_of(self.sequence, 1, self.config)
        self.updates = Updates(self, 1, plan.steps)
        line = {"task": 1, "epoch": len(plan.epochs), "raw": {}, "reused": self.config.first_task}
        self.journal.write(**line, seconds=first["seconds"]["train"][0])
        self.results |= results.first_rows(first, 2)
        self.results["seconds"] |= {"train": [], "consolidate": []}  # the journal tells them
        self.save_progress(plan, len(plan.epochs))

    def recover(self):
        """Go on from the last checkpoint, and score again what results.json lacks."""
        found = results.read_or_none(self.folder)
        if found:
            refuse_other_encoders(self.folder, found, self.visual_sha, self.audio_sha)
        if found and found["tasks"] != self.results["tasks"]:
            raise AtlasError(f"{self.folder}: its tasks now have other clips; choose another name")
        said = folders.consolidations(self.journal.lines())
        self.results = found or self.results | {"consolidations": said}
        if self.results["complete"]:
            return
        kept = folders.checkpoints(self.folder)
        self.learned = max(kept, default=0)
        rows = len(self.results["matrix"]["J"])
        if rows > self.learned + 1:
            print(f"task {rows - 1} has no checkpoint; going on after task {self.learned}")
            self.results |= results.first_rows(self.results, self.learned + 1)
        for t in range(rows, self.learned + 1):
            known = t in (0, *kept)
            print(f"row {t} of R is {'scored again' if known else 'lost and stays null'}")
            if known and t:
                self.load_task(t)
            self.add_row(score_tasks(self, t) | {"seconds": 0.0} if known else None)
        if self.learned:
            self.load_task(self.learned)

    def add_row(self, row):
        """Add a row to every matrix (None: not scored), and what its task took."""
        results.add_scores(self.results, row)
        spent = self.results["seconds"]
        for t in range(len(spent["train"]) + 1, len(self.results["matrix"]["J"])):
            spent["train"].append(self.journal.seconds(t, "raw"))
            spent["consolidate"].append(self.journal.seconds(t, "consolidated"))
        self.results["method_memory_bytes"] = self.memory()
        self.write_results()

    def write_results(self):
        text = json.dumps(self.results, indent=1, allow_nan=False) + "\n"
        folders.write(self.folder / "results.json", text)

    def finish(self):
        """Add what derives from the matrices, and mark the run as complete."""
        joint = results.read_joint(self.config.joint_run, self.results["tasks"])
        metrics = results.derived_metrics(self.results, joint)
        metrics["source_disjoint"] = score_disjoint(self) if self.config.dataset == "ms3" else None
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # kilobytes on Linux
        if self.device == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**20
        self.results |= {"metrics": metrics, "peak_memory_mb": memory, "complete": True}
        self.write_results()
        if not parallel.rank():
            (self.folder / "progress.pt").unlink(missing_ok=True)

    def begin(self, t):
        """Begin task t, or go on with it. Returns its Plan and the number of its epochs done."""
        self.choose_heads(t)
        plan = self.plan = plan_of(self.sequence, t, self.config)
        self.updates, done = Updates(self, t, plan.steps), 0
        state = folders.read_progress(self.folder / "progress.pt")
        if state and state["task"] == t:
            self.model.load_state_dict(state["weights"], strict=False)
            self.method.load_state_dict(state["method"])
            self.updates.load_state_dict(state["updates"])
            done = state["epoch"]
        elif self.is_stream and t > 1:  # its optimiser goes on from the last checkpoint
            path = self.task_folder(t - 1) / "updates.pt"
            before = folders.read_progress(path)
            if not before:
                raise AtlasError(f"{path} is damaged; remove {path.parent}, then --resume again")
            self.updates.load_state_dict(before)
        self.updates.done = plan.steps_before(done + 1)
        self.journal.forget_after(t, done)
        known = self.results.get("consolidations", [])  # an older version kept none until the end
        self.results["consolidations"] = folders.until(known, t, done)
        if not done and not self.is_stream:
            self.method.begin_task(TaskClips(self, t))
        return plan, done

    def choose_heads(self, t):
        """Use what learns task t: TIL's own mask head, and the classes that compete."""
        joint = self.config.method == "joint"
        til = self.config.protocol == "til" and not joint
        decoder, classifier = self.model.decoder, self.model.classifier
        if til and len(decoder.heads) < t:
            decoder.add_head()
        decoder.use_head(t - 1)
        if classifier:
            classifier.compete(t - 1 if til else 0, len(classifier.heads) if joint else t)

    def batches(self, plan, epoch):
        """The batches of an epoch (or chunk), of each this process's part: "whole" are the clips of
        all of it, "share" is this part's weight. All that is random comes from (seed, task, epoch).
        """
        self.epoch = epoch
        order, size = plan.epochs[epoch - 1], self.config.batch_size
        draw = (self.config.seed, plan.t, epoch)
        seed = int(np.random.default_rng(draw).integers(2**63))
        torch.manual_seed(seed + parallel.rank())  # for dropout
        self.model.train()
        dataset = ClipDataset(self.cache, order, draw if self.config.augment else None)
        batches = loader(dataset, size, self.config.workers, self.device, shared=True)
        for k, batch in enumerate(batches):
            whole = order[k * size : (k + 1) * size]
            yield self.labelled(batch) | {"whole": whole, "share": parallel.share(len(whole))}
            if self.is_stream:
                self.cache.close(whole)

    def labelled(self, batch):
        """On the device; with each clip's class among those that compete, if the model has any."""
        batch = to_device(batch, self.device)
        if not self.model.classifier:
            return batch
        labels = self.model.classifier.labels(batch["category"])
        return batch | {"label": labels.to(self.device)}

    @contextlib.contextmanager
    def telling(self, plan, epoch):
        """Around the learning steps of an epoch (or chunk): yields what notes the losses of each.
        At the end their means go to log.jsonl and to the terminal, and the run is saved."""
        title = f"{plan.task_word} {plan.t}, {plan.word} {epoch}/{len(plan.epochs)}"
        bar = tqdm(None, title, plan.steps_of(epoch), False, disable=parallel.quiet(), unit="step")
        totals, start = Counter(), time.time()

        def note(losses, batch):
            clips = len(batch["whole"])
            totals.update({name: value * clips for name, value in losses.items()}, clips=clips)
            bar.update()
            bar.set_postfix(loss=f"{losses['task']:.3f}", refresh=False)

        with bar:
            yield note
        seconds, clips = time.time() - start, totals.pop("clips")
        terms = {name: total / clips for name, total in totals.items()}
        task, penalty, loss = (terms.pop(name) for name in ("task", "penalty", "loss"))
        line = {"task": plan.t, "epoch": epoch}
        line["raw"] = terms | {"penalty": penalty / self.method.unit}
        line["weighted"] = weighted(terms, self.config) | {"penalty": penalty}
        line["lr"] = self.updates.optimizer.param_groups[0]["lr"]
        self.journal.write(**line, seconds=seconds)
        told = f"loss {task:.3f}, penalty {penalty / (loss or 1):.1%} of it, {seconds:.1f} s"
        print(f"{title}: {told}", flush=True)
        self.save_progress(plan, epoch)

    def note_window(self, report):
        """Note what `Method.observe` reports."""
        if report:
            line = {"task": self.plan.t, "epoch": self.epoch, "window": report}
            self.journal.write(**line)
            self.results["consolidations"] += folders.consolidations([line])

    def save_progress(self, plan, epoch):
        self.write_results()
        weights = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        state = {"task": plan.t, "epoch": epoch, "weights": weights}
        state |= {"method": self.method.state_dict(), "updates": self.updates.state_dict()}
        folders.write(self.folder / "progress.pt", state)

    def task_folder(self, t):
        return self.folder / f"task_{t:02d}"

    def load_task(self, t):
        self.load(self.task_folder(t))


class TaskClips:
    """The train clips of a task that a method may measure: this process's part of them."""

    def __init__(self, run, t):
        self.run = run
        chosen = list(run.sequence[t - 1].train)
        if 0 < run.config.lra_clips < len(chosen):
            rng = np.random.default_rng([run.config.seed, t])
            chosen = rng.choice(chosen, run.config.lra_clips, replace=False).tolist()
        self.chosen = parallel.mine(chosen)

    def __iter__(self):
        run = self.run
        run.model.eval()
        counts = run.cache.arrays["annotated"].sum(1)[self.chosen].tolist()
        for frames in sorted(set(counts)):
            alike = [i for i, count in zip(self.chosen, counts) if count == frames]
            batches = loader(ClipDataset(run.cache, alike), SENSITIVITY_BATCH)
            for batch in tqdm(batches, "measuring", leave=False, disable=parallel.quiet()):
                yield run.labelled(batch)

    def loss(self, outputs, batch):
        return sum(weighted(clip_losses(outputs, batch), self.run.config).values()).mean()


def open_data(config):
    """(PackedClips, SHA-256 of the audio encoder); packs the cache if it is missing."""
    clips = READERS[config.dataset](config.data_root)
    encoder = build_audio_encoder(config.audio, config.audio_weights)
    folder = pack(clips, config.data_root, config.cache_dir, config.image_size, encoder)
    return PackedClips(folder), fingerprint(encoder)


def read_run(folder):
    """The Run of a folder, with its results."""
    found = results.read_results(folder)
    run = Run(load_config([Path(folder, "config.yaml")]))
    refuse_other_encoders(folder, found, run.visual_sha, run.audio_sha)
    run.folder, run.results = Path(folder), found
    run.learned = len(found["matrix"]["J"]) - 1
    return run


def refuse_other_encoders(folder, found, visual_sha, audio_sha):
    """The scores of a run hold for its own frozen encoders only."""
    for name, sha in (("visual", visual_sha), ("audio", audio_sha)):
        if sha != found["weights"][name]["sha256"]:
            why = f"its weights differ ({name}_weights, or another version of torch)"
            raise AtlasError(f"the {name} encoder is not the one of the run {folder}: {why}")

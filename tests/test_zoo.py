"""Checkpoints from elsewhere: read without running anything, refused where hostile or broken, and equal to recorded answers.

The writer of EDM's layout below makes the files that the authors' program would make, from facts about their format.
"""
import collections
import copy
import functools
import io
import json
import lzma
import os
import pickle
import pickletools
import random
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file

from ddpm_edm import zoo
from ddpm_edm.consistency import consistency_step, few_levels
from ddpm_edm.core import convert, eps_of, expand, seeded_noise
from ddpm_edm.ddpm import DDPM
from ddpm_edm.dit import DiT
from ddpm_edm.noise import alpha_bars, cosine_betas, karras_sigmas, linear_betas, zero_terminal_snr
from ddpm_edm.oracle import Mixture
from ddpm_edm.precond import EDMPrecond, IDDPMPrecond, VEPrecond, VPPrecond
from ddpm_edm.solvers import euler, generate, heun, sample
from ddpm_edm.train import load, save_denoiser
from ddpm_edm.unet import ADM, UNet, edm_settings, from_edm, to_edm
from ddpm_edm.zoo import (Budget, ClassicUNet, ConvResample, DiffusersModel, Global, Machine, Record, diffusers_settings, from_diffusers, from_pretrained,
                          from_state_dict, import_checkpoint, load_diffusers, load_edm_pickle, model_card, push_to_hub, read_checkpoint, save_pretrained, to_diffusers)

FOLDER = Path(__file__).parent / "golden"
NAMES = ["dhariwal", "iddpm_song", "song_ddpmpp", "song_ncsnpp", "ve_song", "vp_song"]
FUZZ = int(os.environ.get("ZOO_FUZZ", 250))    # changed files of each kind; 10,000 in all take minutes


# --- no code runs: an audit hook sees every import by pickle, exec, system call and new process

WATCHED = {"pickle.find_class", "exec", "compile", "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "os.remove", "os.mkdir", "socket.connect"}
seen, watching = [], False

def hook(event, args):
    if not watching or event not in WATCHED: return
    source = {"exec": lambda: args[0].co_filename, "compile": lambda: str(args[1])}.get(event, str)()
    if not source.startswith((sys.base_prefix, sys.prefix, "<frozen")): seen.append((event, str(args)[:200]))    # Python imports parts of its own library when they are first needed
sys.addaudithook(hook)

@pytest.fixture(autouse=True)
def fewer_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@functools.cache
def warm() -> None:
    "Let torch compile what it compiles on first use."
    with torch.device("meta"): EDMPrecond(UNet(1, 32, (1, 2), embedding="fourier", init="xavier", labels_first=True, num_labels=2)).requires_grad_(False)
    from_edm(tiny()[1], TINY)

def watched(function, *args, **kw):
    "Call, and fail if anything was run. torch itself may compile nothing here."
    global watching
    warm()
    seen.clear(); watching = True
    try: return function(*args, **kw)
    finally:
        watching = False
        assert not seen, seen


# --- files in EDM's layout

class Persistent:
    def __init__(self, name, source="raise SystemExit('the source code was run')", **state): self.name, self.source, self.state = name, source, state
    def __reduce__(self):
        meta = dict(type="class", version=6, module_src=self.source, class_name=self.name, state=self.state)
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None

def module_state(**state): return dict(torch.nn.Module().__dict__) | state

def edm_object(tensors, name, **state):
    inner, mine = {}, {}
    for k, v in tensors.items():
        first, _, rest = k.partition(".")
        if rest: inner.setdefault(first, {})[rest] = v
        else: mine[k] = v
    if name == "ModuleDict":    # not a class of EDM's own: PyTorch's, written as any object
        module = torch.nn.ModuleDict()
        module.__dict__["_modules"] = {k: edm_object(v, "UNetBlock") for k, v in inner.items()}
        return module
    children = {k: edm_object(v, {"model": "SongUNet", "enc": "ModuleDict", "dec": "ModuleDict"}.get(k, "Linear")) for k, v in inner.items()}
    learned = {k: torch.nn.Parameter(v) for k, v in mine.items() if k in ("weight", "bias")}
    rest = {k: v for k, v in mine.items() if k not in learned} | {"resample_filter": mine.get("resample_filter")}
    return Persistent(name, **module_state(_parameters=learned | {"none": None}, _buffers=rest, _modules=children, skip_scale=np.sqrt(0.5), num=np.int64(3), f=np.float32(2),
                                           flag=np.bool_(True)) | state)

def edm_pickle(tensors, config, protocol=4, **more):
    def _reconstruct_persistent_obj(meta): raise NotImplementedError
    class EasyDict(dict): pass
    for thing, module in ((_reconstruct_persistent_obj, "torch_utils.persistence"), (EasyDict, "dnnlib.util")): thing.__module__, thing.__qualname__ = module, thing.__name__
    stand_ins = {name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")}
    stand_ins["torch_utils.persistence"]._reconstruct_persistent_obj, stand_ins["dnnlib.util"].EasyDict = _reconstruct_persistent_obj, EasyDict
    sys.modules.update(stand_ins)
    net = edm_object(tensors, config["cls"], _init_args=(), _init_kwargs=dict(config["kw"], resample_filter=list(config["kw"].get("resample_filter", (1, 1))))
                     if config["kw"].get("model_type") == "SongUNet" else config["kw"])
    content = dict(ema=net, loss_fn=Persistent("EDMLoss", P_mean=-1.2), augment_pipe=None, dataset_kwargs=EasyDict(path="cifar10.zip", use_labels=True))
    try: return pickle.dumps(content | more, protocol=protocol)
    finally:
        for name in stand_ins: del sys.modules[name]

TINY = dict(cls="EDMPrecond", kw=dict(img_resolution=4, img_channels=1, model_type="SongUNet", model_channels=4, channel_mult=[1], num_blocks=1, attn_resolutions=[], resample_filter=[1, 1]))

@functools.cache
def tiny():
    torch.manual_seed(0)
    net = EDMPrecond(UNet(**edm_settings(TINY))).requires_grad_(False).eval()
    for p in net.parameters(): p.add_(0.1 * torch.randn(p.shape))
    return net, to_edm(net, 4)

@functools.cache
def golden(name):
    g = {k: v if v.dtype.kind == "U" else torch.from_numpy(v) for k, v in np.load(FOLDER / f"edm_net_{name}.npz").items()}
    weights = {k: v.float() for k, v in load_safetensors(lzma.decompress((FOLDER / f"edm_net_{name}.safetensors.xz").read_bytes())).items()}
    cond = {}
    if "class_labels" in g: cond["labels"] = g["class_labels"].argmax(1)
    if "augment_labels" in g: cond["augment"] = g["augment_labels"]
    return g, json.loads(str(g["_config"])), cond, weights

def write(folder, content, name="file.pkl"):
    (folder / name).write_bytes(content)
    return folder / name

def error(a, b): return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("name", NAMES)
def test_edm_pickles_answer_as_recorded(name, protocol, tmp_path):
    "2e-5 in float32 and 1e-12 in float64: as in test_published_unets, whose networks these are."
    g, config, cond, weights = golden(name)
    denoise = watched(load_edm_pickle, write(tmp_path, edm_pickle(weights, config, protocol)))
    assert type(denoise).__name__.lower() == config["cls"].lower() and not denoise.training and not any(p.requires_grad for p in denoise.parameters())
    kw = config["kw"]
    assert denoise.config["shape"] == [kw["img_channels"], kw["img_resolution"], kw["img_resolution"]] and denoise.config["edm"]["cls"] == config["cls"]
    with torch.no_grad():
        assert error(denoise(g["x"], g["sigma"], **cond), g["D.f64"]) < 2e-5
        assert error(denoise.double()(g["x"].double(), g["sigma"].double(), **cond), g["D.f64"]) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_imported_networks_can_be_kept(name, tmp_path):
    "From a pickle to safetensors and back: the same bits, with all wrappers."
    g, config, cond, weights = golden(name)
    denoise = load_edm_pickle(write(tmp_path, edm_pickle(weights, config)))
    folder = save_pretrained(denoise, tmp_path / "kept")
    again = watched(from_pretrained, folder)
    assert type(again) is type(denoise) and torch.equal(again(g["x"], g["sigma"], **cond), denoise(g["x"], g["sigma"], **cond))
    assert again.config["shape"] == denoise.config["shape"]
    if name in ("dhariwal", "song_ddpmpp"): assert torch.equal(load(folder)(g["x"], g["sigma"], **cond), again(g["x"], g["sigma"], **cond))    # train.load, so the commands
    if name == "iddpm_song": assert torch.equal(again.u, denoise.u)


def test_other_networks_of_a_file(tmp_path):
    net, weights = tiny()
    bare = edm_object(weights, "EDMPrecond", _init_args=[], _init_kwargs=TINY["kw"])
    file = write(tmp_path, edm_pickle(weights, TINY, net=bare))
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(load_edm_pickle(file, "net")(x, 1.), net(x, 1.))
    with pytest.raises(ValueError, match="it holds no network called 'other'"): load_edm_pickle(file, "other")
    with pytest.raises(FileNotFoundError, match="no file at"): load_edm_pickle(tmp_path / "none.pkl")
    with pytest.raises(FileNotFoundError, match="no file at"): load_edm_pickle(tmp_path)


# --- tensors of PyTorch

def trees():
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    return {"plain": base, "turned": base.T, "part": base[2:, 1:3], "one": torch.tensor(3.), "none": torch.zeros(0, 2), "learned": torch.nn.Parameter(base + 1),
            "half": base.half(), "brain": base.bfloat16(), "double": base.double(), "whole": torch.arange(5), "int": torch.arange(3, dtype=torch.int32), "byte": torch.arange(3).byte(),
            "short": torch.arange(3).short(), "char": torch.arange(3).char(), "yes": base > 0, "nested": {"a": [1, 2.5, None, True, "word", (1, "x")]}, "more": collections.OrderedDict(a=base)}

def same(a, b):
    if isinstance(b, torch.Tensor): return isinstance(a, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(b, dict): return type(a) is dict and a.keys() == b.keys() and all(same(a[k], v) for k, v in b.items())
    if isinstance(b, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b

@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle4", "pickle5", "pickle2"])
def test_tensors_are_as_pytorch_reads_them(kind, tmp_path):
    file, content = tmp_path / "file.pt", trees()
    if kind == "zip": torch.save(content, file)
    elif kind == "legacy": torch.save(content, file, _use_new_zipfile_serialization=False)
    elif kind == "pickle2":    # bytes were no type of Python 2: each is a call of _codecs.encode there, and refused
        write(tmp_path, pickle.dumps(content, 2), "file.pt")
        with pytest.raises(ValueError, match="'_codecs.encode', which no checkpoint needs"): read_checkpoint(file)
        return
    else: write(tmp_path, pickle.dumps(content, int(kind[-1])), "file.pt")
    assert same(watched(read_checkpoint, file), content)

def test_state_dicts_and_safetensors(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(net.state_dict(), tmp_path / "a.pt")    # with an attribute of its OrderedDict, _metadata
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"): assert same(read_checkpoint(tmp_path / name), dict(net.state_dict()))

def test_views_share_their_storage(tmp_path):
    base = torch.randn(1000)
    torch.save({"a": base, "b": base[10:20]}, tmp_path / "a.pt")
    found = read_checkpoint(tmp_path / "a.pt")
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()

@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers(-2**31, 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=300) | st.binary(max_size=300),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4) | st.tuples(inner, inner), max_leaves=20),
       st.sampled_from([3, 4, 5]))
def test_plain_data_comes_back(tree, protocol):
    program = pickle.dumps(tree, protocol)
    assert same(Machine(Budget(len(program)), {}).run(io.BytesIO(program)), tree)

def test_the_machine_has_no_more_instructions_than_it_says():
    have = {i.name for i in pickletools.opcodes if hasattr(Machine, i.name)} | {"STOP"}
    assert len(have) == 41
    assert not have & {"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "LONG", "LONG4", "INT", "DUP", "POP", "POP_MARK", "PUT", "GET", "STRING", "UNICODE", "FROZENSET",
                       "NEXT_BUFFER", "BYTEARRAY8"}
    assert all(rule is None or rule.__module__ == "ddpm_edm.zoo" for rule in zoo._RULES.values())    # nothing that is not ours can be called


# --- hostile files

class Call:
    def __init__(self, function, *arguments): self.call = function, arguments
    def __reduce__(self): return self.call
class State:
    def __init__(self, target, state): self.target, self.state = target, state
    def __reduce__(self): return *self.target, self.state
class Claim:
    "A tensor with claims of its own for a storage of four numbers."
    def __init__(self, *claims): self.claims = claims
    def __reduce__(self):
        rebuild, (storage, *_) = torch.zeros(4).__reduce_ex__(2)
        return rebuild, (storage, *self.claims, False, collections.OrderedDict())

def zipped(content, compression=zipfile.ZIP_STORED, **files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as z:
        z.writestr("x/data.pkl", content)
        for name, value in files.items(): z.writestr(f"x/{name}", value)
    return out.getvalue()

def legacy(obj): return b"".join(pickle.dumps(x, 2) for x in (0x1950a86a20f9469cfc6c, 1001, dict(protocol_version=1001, little_endian=True), obj, []))
def as_key(levels): return b"\x80\x04})" + b"".join(b"\x94h" + bytes([k]) + b"\x86" for k in range(levels)) + b"K\x01s."
def with_kw(**changes): return edm_pickle(tiny()[1], dict(TINY, kw=TINY["kw"] | changes))
def diamonds(levels):
    "Modules that hold the next one twice: 2**levels paths through few objects."
    module = edm_object({"weight": torch.zeros(1)}, "Linear")
    for _ in range(levels): module = Persistent("Linear", **module_state(_modules=dict(a=module, b=module)))
    return edm_pickle(tiny()[1], TINY, ema=Persistent("EDMPrecond", **module_state(_modules=dict(a=module), _init_args=(), _init_kwargs=TINY["kw"])))
def chain(depth):
    module = edm_object({"weight": torch.zeros(1)}, "Linear")
    for _ in range(depth): module = Persistent("Linear", **module_state(_modules={"a" * 30: module}))
    return edm_pickle(tiny()[1], TINY, ema=Persistent("EDMPrecond", **module_state(_modules=dict(a=module), _init_args=(), _init_kwargs=TINY["kw"])))
def lists(depth): return b"\x80\x04" + b"]" * depth + b"a" * (depth - 1) + b"."
def again_and_again(times, numel, word=0):
    "One row of bytes, made a storage again and again; a long word in it has to be read each time, too."
    inner = torch.zeros(numel).__reduce_ex__(2)[1][0].__reduce__()[1][0]
    if word: inner = b"\x80\x02X" + word.to_bytes(4, "little") + b"w" * word + inner[2:]
    one = b"\x80\x04\x8c\x0dtorch.storage\x8c\x10_load_from_bytes\x93\x94B" + len(inner).to_bytes(4, "little") + inner + b"\x94"
    return one + b"h\x00h\x01\x85R" * times + b"."

MARK = Path(tempfile.gettempdir()) / f"zoo_mark_{os.getpid()}"    # what a file that is obeyed leaves
def attacks(mark):
    touch, opened = f"touch {mark}", f"open({str(mark)!r}, 'w')"
    net = lambda thing: edm_pickle(tiny()[1], TINY, ema=thing)
    return {
        "os.system": (pickle.dumps(Call(os.system, touch)), "asks for '(posix|nt).system', which no checkpoint needs; nothing was run"),
        "protocol 0": (pickle.dumps(Call(os.system, touch), 0), "asks for|uses the instruction"),
        "eval": (pickle.dumps(Call(eval, opened)), "'builtins.eval'"),
        "exec": (pickle.dumps(Call(exec, opened), 2), "'__builtin__.(eval|exec)'"),
        "getattr": (pickle.dumps(Call(getattr, Call(__import__, "os"), "system")), "'builtins.getattr'"),
        "subprocess": (pickle.dumps(Call(subprocess.Popen, ["touch", str(mark)])), "'subprocess.Popen'"),
        "torch.load": (pickle.dumps(Call(torch.load, "x")), "'torch.serialization.load'"),
        "beside the network": (edm_pickle(tiny()[1], TINY, more=Call(os.mkdir, str(mark))), "'posix.mkdir'"),
        "in the settings": (with_kw(dropout=Call(os.mkdir, str(mark))), "'posix.mkdir'"),
        "as state": (pickle.dumps(State((torch.nn.ModuleDict, ()), Call(os.mkdir, str(mark)))), "'posix.mkdir'"),
        "state of a function": (b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x93}b.", "sets the state of a Global"),
        "state of a list": (b"\x80\x04]}b.", "sets the state of a list"),
        "state twice": (b"\x80\x04\x8c\x1atorch.nn.modules.container\x8c\nModuleDict\x93)\x81}b}b.", "sets the state of a Record"),
        "in a storage": (pickle.dumps({"ema": Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.mkdir, str(mark))))}), "'posix.mkdir'"),
        "in a legacy file": (legacy(Call(os.mkdir, str(mark))), "'posix.mkdir'"),
        "legacy in a storage": (pickle.dumps(Call(torch.storage._load_from_bytes, legacy(torch._utils._rebuild_tensor_v2))), "'torch._utils._rebuild_tensor_v2'"),
        "storage in a storage": (pickle.dumps(Call(torch.storage._load_from_bytes, legacy(Call(torch.storage._load_from_bytes, b"")))), "'torch.storage._load_from_bytes'"),
        "in a zip": (zipped(pickle.dumps(Call(os.mkdir, str(mark)))), "'posix.mkdir'"),
        "INST": (b"(S'" + touch.encode() + b"'\nios\nsystem\n.", "instruction STRING"),
        "INST alone": (b"(ios\nsystem\n.", "instruction INST"),
        "OBJ": (b"\x80\x02(cos\nsystem\no.", "'os.system'"),
        "EXT1": (b"\x80\x02\x82\x01)R.", "instruction EXT1"),
        "PERSID": (b"Pid\n.", "instruction PERSID"),
        "outside": (b"\x80\x02NQ.", "refers to something outside"),
        "a name later": (b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x93\x94\x8c\x06system\x94\x8c\x02os\x94h\x02h\x01\x93)R.", "'os.system'"),
        "a dotted name": (b"\x80\x04\x8c\x0bcollections\x8c\x16OrderedDict.fromkeys.x\x93.", "asks for 'collections.OrderedDict.fromkeys.x'"),
        "a name of tuples": (b"\x80\x04)\x8c\x01x\x93.", "a name that is no word"),
        "a mere word called": (b"\x80\x04\x8c\x05torch\x8c\x0cFloatStorage\x93K\x05\x85R.", "calls torch.FloatStorage, which is a mere word"),
        "a call of a word": (b"\x80\x02X\x04\x00\x00\x00evil)R.", "it calls a str"),
        "arguments in a list": (b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x93]R.", "it calls a Global"),
        "too many arguments": (b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x93K\x01\x85R.", "TypeError"),
        "an escape sequence": (b"cx\x1b[2Jevil\nname\n.", r"asks for 'x\\x1b\[2Jevil.name'"),
        "a tuple as a key": (as_key(100), "has a tuple as a key"),
        "a large number as a key": (b"\x80\x04}\x8a\x08" + (2**61 - 1).to_bytes(8, "little") + b"K\x01s.", "has a int as a key"),
        "a tuple in a set": (b"\x80\x04\x8f()\x90.", "a set of other things"),
        "keys of a list": (b"\x80\x04]K\x01K\x01s.", "treats a list as a dict"),
        "an odd number of items": (b"\x80\x04}(K\x01u.", "ValueError|longer than|shorter than"),
        "a number of 2 GB": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "not enough data"),
        "a large number": (b"\x80\x02\x8b\x01\x00\x00\x00\x01.", "instruction LONG4"),
        "2**60 bytes": (b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b".", "expected"),
        "a frame of 2**60": (b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b".", "IndexError|exhausted"),
        "a million steps": (b"\x80\x02" + b")" * 1_100_000 + b".", "asks for more steps"),
        "deep lists": (lists(200_000)[:-1] + b"0.", "instruction POP"),
        "open marks": (b"\x80\x02" + b"(" * 100_000 + b".", "IndexError"),
        "unknown memo": (b"\x80\x02h\x07.", "KeyError"),
        "empty": (b"", "exhausted"),
        "no end": (b"\x80\x04N", "exhausted"),
        "not a pickle": (b"\xff\xd8\xff\xe0 a picture", "unknown"),
        "diamonds": (diamonds(40), "is no module of its own"),
        "a long chain": (chain(12), "is no module of its own"),
        "one storage often": (again_and_again(2000, 25_000), "asks for more bytes"),
        "one word often": (again_and_again(2000, 1, 100_000), "asks for more bytes"),
        "another class": (edm_pickle(tiny()[1], dict(TINY, cls="Evil")), "cls must be .*, got 'Evil'"),
        "another version": (edm_pickle(tiny()[1], TINY).replace(b"version\x94K\x06", b"version\x94K\x05"), "in a form that EDM's files do not use"),
        "no module": (net(Persistent("EDMPrecond", _init_args=(), _init_kwargs=TINY["kw"], _modules=[1])), "is no module"),
        "no settings": (net(Persistent("EDMPrecond", **module_state())), "does not say by which settings"),
        "positional settings": (net(Persistent("EDMPrecond", **module_state(_init_args=(4, 1), _init_kwargs={}))), "does not say by which settings"),
        "a tensor in the settings": (with_kw(dropout=torch.zeros(2)), "the setting 'dropout' is no word, number or short list"),
        "nested settings": (with_kw(dropout=[[[]]]), "the setting 'dropout'"),
        "a long list": (with_kw(channel_mult=[1] * 17), "the setting 'channel_mult'"),
        "10**30 pixels": (with_kw(img_resolution=10**30), "the setting 'img_resolution'"),
        "10**10 weights": (with_kw(model_channels=100_000), "settings ask for .* weights, and the file holds"),
        "many blocks": (with_kw(num_blocks=90_000), "its settings ask for"),
        "many levels": (with_kw(channel_mult=[1] * 16, num_blocks=90), "its settings ask for"),
        "blocks of words": (with_kw(num_blocks="many"), "TypeError|ValueError"),
        "no blocks": (with_kw(num_blocks=-5), "blocks must be a positive integer"),
        "many labels": (with_kw(label_dim=100_000, model_channels=100_000), "settings ask for"),
        "a module for a tensor": (net(Persistent("EDMPrecond", **module_state(_parameters=dict(a=[1]), _init_args=(), _init_kwargs=TINY["kw"]))), "'a' in it is no tensor"),
        "whole numbers": (edm_pickle(tiny()[1] | {"model.steps": torch.arange(3)}, TINY), "no tensor of real numbers"),
        "a lost tensor": (edm_pickle({k: v for k, v in tiny()[1].items() if "map_layer0.bias" not in k} | {"model.x": torch.zeros(99)}, TINY), "missing are model.map_layer0.bias; unexpected"),
        "a compressed zip": (zipped(pickle.dumps({}), zipfile.ZIP_DEFLATED), "is compressed"),
        "a zip of zeros": (zipped(b"\x80\x02" + b"N" * 10**6, zipfile.ZIP_DEFLATED), "is compressed"),
        "a zip without": (zipped(b"").replace(b"data.pkl", b"atad.pkl"), "StopIteration|ValueError"),
        "half a zip": (zipped(pickle.dumps({"a": 1}))[:60], "BadZipFile"),
        "big-endian": (zipped(pickle.dumps({}), byteorder=b"big"), "big-endian"),
        "unknown numbers": (pickle.dumps(np.longdouble(2)), "number of an unknown kind"),
        "arrays": (pickle.dumps(np.zeros(3)), "asks for 'numpy"),
        "objects": (pickle.dumps(np.array([Call(os.mkdir, str(mark))])), "asks for 'numpy"),
    } | {f"tensor {c}": (pickle.dumps({"ema": Claim(*c)}), "describes a tensor") for c in (
        (0, (10**9,), (0,)), (0, (5,), (1,)), (3, (2,), (1,)), (0, (2, 2), (4, 1)), (0, (-1,), (1,)), (0, (2,), (-1,)), (-1, (2,), (1,)), (0, (2,), (1, 1)), (0, [2], [1]), (0, (2.,), (1,)),
        (0, (True,), (1,)), (0, (1,) * 9, (1,) * 9), (0, (2**50,), (1,)))}

ATTACKS = attacks(MARK)

@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_files_are_refused(name, tmp_path):
    "By a ValueError of one short line that names the file, soon, and without anything being run."
    content, wanted = ATTACKS[name]
    file = write(tmp_path, content)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=wanted) as e: watched(load_edm_pickle, file)
    assert str(e.value).startswith(f"{file} can't be read safely: ") and len(str(e.value)) < 700 and "\n" not in str(e.value) and "\x1b" not in str(e.value)
    assert time.perf_counter() - start < 20    # the slowest takes 2 s on an idle core
    assert not MARK.exists()

def test_deep_and_tangled_data_is_harmless():
    "Such data may be there, beside the network: it must neither be walked through nor printed."
    deep = Machine(Budget(0), {}).run(io.BytesIO(lists(100_000)))
    assert type(deep) is list
    itself = Machine(Budget(0), {}).run(io.BytesIO(b"\x80\x04]\x94h\x00a."))
    assert itself[0] is itself

def test_what_pickle_itself_would_do(tmp_path):
    "The attacks are real: the standard library falls for them, and the hook sees it."
    with pytest.raises(AssertionError, match="pickle.find_class"): watched(pickle.loads, pickle.dumps(Call(os.getcwd)))
    pickle.loads(pickle.dumps(Call(os.mkdir, str(tmp_path / "mark"))))
    assert (tmp_path / "mark").exists()

def test_memory_stays_in_proportion(tmp_path):
    "A file of 1 MB may not ask for more than a few: here a storage that says 10**11 numbers."
    program = pickle.dumps(torch.zeros(250_000))
    lie = program.replace(b"K\x03", b"K\x03")    # storages' lengths stand in the inner pickle
    inner = next(a for _, a, _ in pickletools.genops(program) if isinstance(a, bytes))
    lie = program.replace(inner, inner.replace(b"J\x90\xd0\x03\x00", b"J\xff\xff\xff\x7f"))
    assert lie != program
    with pytest.raises(ValueError, match="asks for more bytes"): read_checkpoint(write(tmp_path, lie))


# --- changed files

def changed(content, rng):
    "One of the ways in which a file goes wrong, or is made to."
    b, n = bytearray(content), len(content)
    kind, at = rng.randrange(8), rng.randrange(n)
    if kind == 0: b[at] ^= 1 << rng.randrange(8)
    elif kind == 1: b[at] = rng.randrange(256)
    elif kind == 2: del b[at:at + rng.randrange(1, 64)]
    elif kind == 3: b[at:at] = rng.randbytes(rng.randrange(1, 16))
    elif kind == 4: del b[at:]
    elif kind == 5:
        source = rng.randrange(n)
        b[at:at + 32] = b[source:source + 32]
    elif kind == 6: b[at] = ord(rng.choice("cR\x93\x81bo.QiP(0\x85)]}ru"))    # instructions where values were
    else:
        for _ in range(5): b[rng.randrange(n)] = rng.randrange(256)
    return bytes(b)

def survives(read, content, file, allowed=ValueError):
    file.write_bytes(content)
    start = time.perf_counter()
    try: watched(read, file)
    except allowed as e: assert "\n" not in str(e) and len(str(e)) < 700
    assert time.perf_counter() - start < 20

@pytest.mark.parametrize("part", range(2))
def test_changed_edm_pickles(part, tmp_path):
    rng, sound = random.Random(part), edm_pickle(tiny()[1], TINY)
    for _ in range(FUZZ // 2): survives(load_edm_pickle, changed(sound, rng), tmp_path / "file.pkl")

@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_changed_files_of_pytorch(kind, tmp_path):
    rng, out = random.Random(3), io.BytesIO()
    if kind == "pickle": out.write(pickle.dumps(trees()))
    else: torch.save(trees(), out, _use_new_zipfile_serialization=kind == "zip")
    for _ in range(FUZZ): survives(read_checkpoint, changed(out.getvalue(), rng), tmp_path / "file.pt")

def test_changed_files_of_our_own(tmp_path):
    rng = random.Random(4)
    sound = (save_pretrained(VPPrecond(tiny()[0].net), tmp_path / "sound") / "model.safetensors").read_bytes()
    for _ in range(FUZZ): survives(lambda f: from_pretrained(f.parent), changed(sound, rng) if rng.random() < 0.2 else changed(sound[:2500], rng) + sound[2500:], tmp_path / "model.safetensors")

@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([i.code.encode("latin1") for i in pickletools.opcodes]) | st.binary(max_size=6) | st.sampled_from(
    [b"\x8c\x0bcollections", b"\x8c\x0bOrderedDict", b"\x8c\x05torch", b"\x8c\x0cFloatStorage", b"\x93", b"K\x01", b"\x85R", b"h\x00", b"\x94", b"}", b"]", b"(", b"u"]), max_size=40))
def test_random_programs_end(parts):
    "Any row of instructions ends in plain data or an error, and calls nothing."
    program = b"\x80\x04" + b"".join(parts) + b"."
    try: made = watched(Machine(Budget(len(program)), zoo._RULES).run, io.BytesIO(program))
    except Exception as e: assert not isinstance(e, (MemoryError, RecursionError))
    else: assert type(made) in (int, float, str, bytes, bool, type(None), list, dict, tuple, set, Global, Record)


# --- other layouts

ZOO = np.load(FOLDER / "zoo.npz")    # answers of guided-diffusion, of the DDIM code's layout and of diffusers, in float64

def recipe(shapes, seed=0):
    "The recorded networks' weights: normal numbers in the order of names, scaled by what flows into a unit."
    rng, out = np.random.Generator(np.random.PCG64(seed)), {}
    for k in sorted(shapes):
        w, bell = rng.standard_normal(shapes[k]), len(shapes[k]) == 1
        out[k] = torch.from_numpy((w / np.sqrt(25. if bell else np.prod(shapes[k][1:])) + (bell and k.endswith("weight"))).astype(np.float32))
    return out

@functools.cache
def recorded(name):
    meta = json.loads(str(ZOO[f"{name}._meta"]))
    return meta, recipe(meta["shapes"]), *(torch.from_numpy(ZOO[k]) for k in (f"{name}.x", "t", "labels", f"{name}.F"))

STATE_DICTS = dict(guided_updown=dict(head_dim=16), guided_new_order=dict(head_dim=16, interleaved=False), improved=dict(head_dim=32), ddim={})

def answer(net, x, t, labels): return net(x, t.to(x.dtype), **(dict(labels=labels) if net.num_labels else {}))

@pytest.mark.parametrize("name", STATE_DICTS)
def test_state_dicts_answer_as_recorded(name):
    "1e-12 in float64; 1e-4 in float32, where step 999 times a frequency is rounded to 6e-5 of a radian."
    _, weights, x, t, labels, F = recorded(name)
    d = from_state_dict(weights, **STATE_DICTS[name])
    assert (answer(d.net, x, t, labels) - F).abs().max() < 1e-3
    assert (answer(d.net.double(), x.double(), t, labels) - F).abs().max() < 1e-12
    assert d.chain.learns == (F.shape[1] == 2 * x.shape[1]) and not d.training
    # and as a denoiser: the first half of the answer is the noise
    s, cond = d.chain.sigmas[t], dict(labels=labels) if d.net.num_labels else {}
    D = d(x.double() * (1 + s**2).sqrt()[:, None, None, None], s, **cond)
    want = convert(F[:, :x.shape[1]], x.double() * expand((1 + s**2).sqrt(), x.double()), s, "eps", "D")
    assert (D - want).abs().max() / want.abs().max() < 1e-9

@pytest.mark.parametrize("name", ["diffusers_ddpm", "diffusers_default", "diffusers_adm"])
def test_diffusers_networks_answer_as_recorded(name):
    meta, weights, x, t, labels, F = recorded(name)
    net = zoo._built(diffusers_settings(meta["config"]), weights, "diffusers")
    assert (answer(net.double(), x.double(), t, labels) - F).abs().max() < 1e-12

def test_order_and_heads_matter():
    "No shape tells them, so the answers must: a wrong setting is not silently the same."
    _, weights, x, t, labels, F = recorded("guided_updown")
    for wrong in (dict(head_dim=16, interleaved=False), dict(head_dim=32), dict(head_dim=None)):
        assert (answer(from_state_dict(weights, **wrong).net, x, t, labels) - F).abs().max() > 1e-2

def test_padding_matters():
    meta, weights, x, t, labels, F = recorded("diffusers_ddpm")
    net = zoo._built(diffusers_settings(dict(meta["config"], downsample_padding=1)), weights, "diffusers")
    assert (answer(net, x, t, labels) - F).abs().max() > 1e-2

@pytest.mark.parametrize("name", ["guided_updown", "improved", "ddim"])
@pytest.mark.parametrize("spoil, wanted", [
    (lambda w: {k: v for k, v in w.items() if "out_layers.0" not in k and "norm2" not in k}, "missing are"),
    (lambda w: w | {"extra.weight": torch.zeros(3)}, "unexpected are extra.weight"),
    (lambda w: {k: v[:-1] if k in ("time_embed.2.bias", "temb.dense.1.bias") else v for k, v in w.items()}, "time_embed.2.bias has shape|temb.dense.1.bias has shape"),
    (lambda w: {k: v.new_zeros(2**20) if k == next(iter(w)) else v for k, v in w.items()}, "has shape|can't be read"),
])
def test_spoilt_state_dicts_are_refused(name, spoil, wanted):
    with pytest.raises(ValueError, match=wanted): from_state_dict(spoil(dict(recorded(name)[1])), **STATE_DICTS[name])

def test_foreign_state_dicts_are_refused():
    with pytest.raises(ValueError, match="neither guided-diffusion nor DDIM calls its tensors a, b"): from_state_dict({"a": torch.zeros(1), "b": torch.zeros(1)})
    with pytest.raises(ValueError, match="state dict can't be read safely"): from_state_dict({"input_blocks.0.0.weight": torch.zeros(4, 3, 3, 3)})
    with pytest.raises(ValueError, match="its settings ask for"):    # a number in a name that would build a million blocks
        from_state_dict({"temb.dense.0.weight": torch.zeros(1), "conv_in.weight": torch.zeros(32, 3, 3, 3), "conv_out.weight": torch.zeros(3, 32, 3, 3), "down.0.block.0.conv1.weight": torch.zeros(32, 1),
                         "down.0.block.999999.conv1.weight": torch.zeros(1)})

CONFIG = json.loads(str(ZOO["diffusers_adm._meta"]))["config"]
@pytest.mark.parametrize("change, wanted", [
    (dict(_class_name="UNet2DConditionModel"), "_class_name must be 'UNet2DModel', got 'UNet2DConditionModel'"),
    (dict(center_input_sample=True), "center_input_sample must be False"), (dict(time_embedding_type="fourier"), "time_embedding_type must be 'positional'"),
    (dict(class_embed_type="identity"), "class_embed_type must be None"), (dict(act_fn="gelu"), "act_fn must be 'silu' or 'swish'"),
    (dict(add_attention=False), "add_attention must be True"), (dict(resnet_time_scale_shift="ada_group"), "resnet_time_scale_shift must be"),
    (dict(down_block_types=["SkipDownBlock2D", "AttnDownBlock2D"]), "blocks of the kind 'SkipDownBlock2D'"),
    (dict(down_block_types=["AttnDownBlock2D", "AttnDownBlock2D"]), "attends on the same levels"),
    (dict(downsample_type="conv", down_block_types=["DownBlock2D", "AttnDownBlock2D"]), "resamples in one way, this one in conv and resnet"),
    (dict(flip_sin_to_cos=False), "cosines first with freq_shift 0"), (dict(block_out_channels=[32, 48]), "multiples of the first"),
    (dict(attn_norm_num_groups=8), "one number of groups"), (dict(norm_num_groups=7, attn_norm_num_groups=7), "groups must divide all widths, got 7"),
    (dict(time_embedding_dim=999), "time_embedding_dim must be None"), (dict(layers_per_block=0), "blocks must be a positive integer"),
])
def test_what_our_unet_cannot_express_is_refused_by_name(change, wanted):
    with pytest.raises(ValueError, match=wanted): zoo._built(diffusers_settings(CONFIG | change), {str(i): torch.zeros(10**6) for i in range(100)}, "diffusers")

def test_published_adm_is_adm():
    with torch.device("meta"):
        theirs = ClassicUNet(**diffusers_settings(dict(
            block_out_channels=[192, 384, 576, 768], layers_per_block=3, attention_head_dim=64, num_class_embeds=1000, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=32,
            downsample_type="resnet", upsample_type="resnet", down_block_types=["ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3], up_block_types=[*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"])))
        ours = UNet(3, 192, (1, 2, 3, 4), 3, (1, 2, 3), 1000, **ADM)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters()) == 295_899_267
    assert [m.num_groups for m in theirs.modules() if hasattr(m, "num_groups")] == [m.num_groups for m in ours.modules() if hasattr(m, "num_groups")]

def test_classic_unet():
    with pytest.raises(ValueError, match="convs must be None, 'even' or 'corner', got 'odd'"): ClassicUNet(3, convs="odd")
    with pytest.raises(ValueError, match="groups must divide all widths, got 32 groups for 48"): ClassicUNet(3, channels=48)
    net = ClassicUNet(3, channels=32, mults=(1, 1, 2), groups=8, num_labels=3)
    again = ClassicUNet(**json.loads(json.dumps(net.config)))
    assert again.config == net.config and again.state_dict().keys() == net.state_dict().keys()
    assert net(torch.randn(2, 3, 8, 16), torch.zeros(2), labels=torch.tensor([0, -1])).shape == (2, 3, 8, 16)
    x = torch.zeros(1, 1, 4, 4); x[..., 1, 1] = 1
    for even, where in ((False, [[1, 0], [0, 0]]), (True, [[1, 1], [1, 1]])):    # which outputs see pixel (1, 1)
        c = ConvResample(1, False, even)
        torch.nn.init.ones_(c.conv.weight); torch.nn.init.zeros_(c.conv.bias)
        assert c(x).squeeze().tolist() == where


# --- folders of diffusers, without diffusers

def pipeline(folder, name="diffusers_ddpm", scheduler=(), rename=lambda k: k, **unet):
    meta, weights, *_ = recorded(name)
    for part in ("unet", "scheduler"): (folder / part).mkdir(parents=True)
    (folder / "unet/config.json").write_text(json.dumps(meta["config"] | unet))
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(dict(_class_name="DDPMScheduler", beta_schedule="linear", prediction_type="epsilon") | dict(scheduler)))
    save_file({rename(k): v for k, v in weights.items()}, folder / "unet/diffusion_pytorch_model.safetensors")
    return folder

def test_folders_of_diffusers(tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    def older(k): return functools.reduce(lambda k, new: k.replace(new, old[new]), old, k)
    a, b = watched(load_diffusers, pipeline(tmp_path / "a")), load_diffusers(pipeline(tmp_path / "b", rename=older))
    *_, x, t, labels, F = recorded("diffusers_ddpm")
    assert (answer(a.net.double(), x.double(), t, labels) - F).abs().max() < 1e-12 and torch.equal(a.net.float()(x, t.float()), b.net(x, t.float()))
    assert a.config == dict(shape=[3, 8, 8], source="a")
    assert torch.equal(from_pretrained(save_pretrained(a, tmp_path / "kept"))(x, 2.), a(x, 2.))
    assert torch.equal(import_checkpoint(tmp_path / "a")(x, 2.), a(x, 2.)) and torch.equal(import_checkpoint(tmp_path / "kept")(x, 2.), a(x, 2.))

@pytest.mark.parametrize("settings_, betas, predicts", [
    (dict(beta_start=1e-3, beta_end=0.01, prediction_type="v_prediction"), linear_betas(1000, 1e-3, 0.01), "v"),
    (dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=100, prediction_type="sample"), cosine_betas(100), "D"),
    (dict(beta_schedule="linear", rescale_betas_zero_snr=True, prediction_type="v_prediction"), zero_terminal_snr(linear_betas()), "v"),
    (dict(trained_betas=[0.1, 0.2, 0.3]), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), "eps"),
])
def test_schedulers_of_folders(settings_, betas, predicts, tmp_path):
    chain = load_diffusers(pipeline(tmp_path / "a", scheduler=settings_)).chain
    assert torch.allclose(chain.betas, betas, atol=1e-12) and chain.predicts == predicts

@pytest.mark.parametrize("kw, wanted", [
    (dict(scheduler=dict(beta_schedule="own")), "beta_schedule must be one of linear"), (dict(scheduler=dict(prediction_type="flow_prediction")), "prediction_type must be one of epsilon"),
    (dict(scheduler=dict(num_train_timesteps=10**9)), "num_train_timesteps must be from 1 to 100000"), (dict(layers_per_block=10**8), "its settings ask for"),
    (dict(block_out_channels=[32, 3200]), "has shape"), (dict(in_channels=1), "conv_in.weight has shape"),
])
def test_folders_refused(kw, wanted, tmp_path):
    with pytest.raises(ValueError, match=wanted): load_diffusers(pipeline(tmp_path / "a", **kw))

def test_incomplete_folders_are_refused(tmp_path):
    folder = pipeline(tmp_path / "a")
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(dict(_class_name="FlowMatchEulerDiscreteScheduler")))
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no table of betas"): load_diffusers(folder)
    (folder / "scheduler/scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match="can't be read safely: JSONDecodeError"): load_diffusers(folder)
    (folder / "scheduler/scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="scheduler_config.json"): load_diffusers(folder)
    with pytest.raises(FileNotFoundError, match="no unet/config.json"): load_diffusers(tmp_path)
    folder = pipeline(tmp_path / "b")
    os.remove(folder / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="unet holds no diffusion_pytorch_model"): load_diffusers(folder)
    torch.save(recorded("diffusers_ddpm")[1], folder / "unet/diffusion_pytorch_model.bin")    # the older name of weights
    assert load_diffusers(folder).net.channels == 32
    write(folder / "unet", pickle.dumps(Call(os.mkdir, str(tmp_path / "mark"))), "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="nothing was run"): watched(load_diffusers, folder)
    assert not (tmp_path / "mark").exists()


# --- models and schedulers of diffusers

WORLD = Mixture(torch.tensor([[-1., 0.], [1., 0.5]], dtype=torch.float64), 0.05)
def plain_scheduler(kind="epsilon", betas=None): return SimpleNamespace(config=dict(prediction_type=kind), alphas_cumprod=alpha_bars(linear_betas() if betas is None else betas))

@pytest.mark.parametrize("steps", ["nearest", "interpolated"])
@pytest.mark.parametrize("kind, predicts", [("epsilon", "eps"), ("sample", "D"), ("v_prediction", "v")])
def test_from_diffusers_is_exact_on_the_table(kind, predicts, steps):
    chain = DDPM(linear_betas(), predicts=predicts)
    net = chain.network(WORLD)
    d = from_diffusers(lambda x, t: SimpleNamespace(sample=net(x, t.round().long())), plain_scheduler(kind), steps)
    sigma = chain.sigmas[[0, 7, 500, 999]]
    x = WORLD.sample(4, torch.Generator().manual_seed(0)) + sigma[:, None] * torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (d(x, sigma) - WORLD(x, sigma)).abs().max() < 1e-6    # times sigma, up to 157, in float64, through the root of 1 - alpha_bar

def test_between_the_table_steps_are_rounded_or_not():
    told = []
    def model(x, t, **cond):
        told.append((t, cond))
        return (x,)
    mid = (DDPM(linear_betas()).sigmas[4] * DDPM(linear_betas()).sigmas[5]).sqrt()
    for steps in ("nearest", "interpolated"): from_diffusers(model, plain_scheduler(), steps)(torch.zeros(3, 2), mid * 1.001, labels=torch.arange(3), encoder_hidden_states=7)
    (near, cond), (between, _) = told
    assert near.tolist() == [5, 5, 5] and not near.is_floating_point() and 4.5 < between[0] < 4.6 and between.is_floating_point()
    assert cond["class_labels"].tolist() == [0, 1, 2] and cond["encoder_hidden_states"] == 7 and "labels" not in cond

def test_from_diffusers_refuses():
    with pytest.raises(ValueError, match="steps must be 'interpolated' or 'nearest', got 'all'"): from_diffusers(None, plain_scheduler(), "all")
    with pytest.raises(ValueError, match="SimpleNamespace has no table alphas_cumprod"): from_diffusers(None, SimpleNamespace(config={}))
    with pytest.raises(ValueError, match="prediction_type must be one of"): from_diffusers(None, plain_scheduler("flow_prediction"))

def test_zero_terminal_snr():
    d = from_diffusers(lambda x, t: x, plain_scheduler("v_prediction", zero_terminal_snr(linear_betas())))
    assert d(torch.ones(2, 2), 1e4).isfinite().all()
    with pytest.raises(ValueError, match="predicts must be"): from_diffusers(lambda x, t: x, plain_scheduler("epsilon", zero_terminal_snr(linear_betas())))

def test_there_and_back():
    model = DiffusersModel(WORLD, (2,), linear_betas())
    d, x = from_diffusers(model, plain_scheduler()), torch.randn(5, 2, dtype=torch.float64)
    for sigma in (0.011, 0.3, 5., 150.): assert (d(x * sigma, sigma) - WORLD(x * sigma, sigma)).abs().max() < 1e-6
    assert torch.equal(model(x, 5, return_dict=False)[0], model(x, torch.tensor([5] * 5)).sample)
    assert (model(x, 250).sample - eps_of(WORLD(x * (1 + model.sigmas[250]**2).sqrt(), model.sigmas[250]), x * (1 + model.sigmas[250]**2).sqrt(), model.sigmas[250])).abs().max() < 1e-9
    def labelled(x, sigma, labels): return x * labels[:, None]
    assert DiffusersModel(labelled, (2,), linear_betas())(x, 3, class_labels=torch.ones(5)).sample.abs().max() < 1e-12

def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="pip install diffusers"): to_diffusers(WORLD, (2,))

def test_nothing_optional_is_imported():
    code = "import sys, ddpm_edm, ddpm_edm.zoo; print([m for m in ('diffusers', 'huggingface_hub', 'accelerate', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


class TestWithDiffusers:
    @pytest.fixture(autouse=True)
    def diffusers(self): return pytest.importorskip("diffusers")

    @pytest.mark.parametrize("n", [10, 50])
    @pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler"])
    def test_their_samplers_are_ours(self, diffusers, kind, n):
        "DDIM and Euler are one method in two coordinates; 1e-4: their tables are float32."
        model, ddim = to_diffusers(WORLD, (2,))
        scheduler = getattr(diffusers, kind).from_config(ddim.config)
        scheduler.set_timesteps(n)
        sigmas = torch.cat([model.sigmas[torch.arange(1000 // n - 1, 1000, 1000 // n)].flip(0), torch.zeros(1, dtype=torch.float64)])
        noise = seeded_noise(range(50), (2,), torch.float64)
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps: x = scheduler.step(model(scheduler.scale_model_input(x, t), t).sample, t, x, return_dict=True).prev_sample
        start = (1 + sigmas[0]**2).sqrt() if kind == "DDIMScheduler" else torch.as_tensor(float(scheduler.init_noise_sigma))
        assert (x - sample(WORLD, noise * start / sigmas[0], sigmas, euler)).abs().max() < 1e-4

    def test_pipelines_take_our_model(self, diffusers):
        denoise = EDMPrecond(UNet(1, channels=32, mults=(1,), attention=()), 0.5)
        model, scheduler = to_diffusers(denoise, (1, 8, 8))
        pipe = diffusers.DDIMPipeline(model, scheduler)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(batch_size=2, num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0)).images
        assert images.shape == (2, 8, 8, 1) and np.isfinite(images).all()

    def test_folders_written_by_diffusers(self, diffusers, tmp_path):
        "Ours from the folder, without diffusers, and theirs wrapped: one denoiser."
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(8, 3, 3, block_out_channels=(32, 64), layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
        scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
        diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "pipe")
        ours, theirs, x = load_diffusers(tmp_path / "pipe"), from_diffusers(unet.eval(), scheduler), torch.randn(2, 3, 8, 8)
        for sigma in (0.02, 0.5, 30.):
            with torch.no_grad(): assert (ours(x * sigma, sigma) - theirs(x * sigma, sigma)).abs().max() < 1e-3 * max(sigma, 1)    # float32 betas, and steps between two in float32

    def test_karras_models(self, diffusers):
        "EDM's own preconditioning, as diffusers' EDM schedulers have it."
        scheduler = diffusers.EDMEulerScheduler(sigma_data=0.7)
        F = lambda x, t, **_: torch.tanh(x + t[:, None])
        d, x, sigma = from_diffusers(F, scheduler), torch.randn(3, 2), torch.tensor(2.5)
        out = F(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma).expand(3))
        assert (d(x, sigma) - scheduler.precondition_outputs(x, out, sigma)).abs().max() < 1e-6

    @pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler", "CMStochasticIterativeScheduler", "ScoreSdeVeScheduler"])
    def test_other_processes_are_refused(self, diffusers, kind):
        with pytest.raises(ValueError, match="has no table alphas_cumprod"): from_diffusers(lambda x, t: x, getattr(diffusers, kind)())


# --- files of our own, and the Hub

@functools.cache
def small(num_labels=3):
    torch.manual_seed(0)
    net = UNet(1, channels=32, mults=(1,), attention=(), num_labels=num_labels).requires_grad_(False).eval()
    for p in net.parameters(): p.add_(0.1 * torch.randn(p.shape))
    return net

WRAPPERS = [lambda n: EDMPrecond(n, 0.7), lambda n: VPPrecond(n, beta_d=10., predicts="v"), VEPrecond, lambda n: IDDPMPrecond(n, linear_betas(50), "D"),
            lambda n: DDPM(cosine_betas(20), predicts="D", variance="large").respace(torch.tensor([0, 3, 19])).denoiser(n)]

@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("net", ["UNet", "ClassicUNet", "DiT"])
def test_all_wrappers_come_back(wrap, net, tmp_path):
    torch.manual_seed(0)
    net = dict(UNet=small, ClassicUNet=lambda: ClassicUNet(1, channels=32, mults=(1, 2), num_labels=3), DiT=lambda: DiT(1, 2, 32, 1, 2, num_labels=3))[net]().requires_grad_(False)
    for p in net.parameters(): p.add_(0.1 * torch.randn(p.shape))    # no answer is 0
    d = wrap(net).eval()
    d.config = dict(shape=[1, 8, 8], note="x")
    again = watched(from_pretrained, save_pretrained(d, tmp_path / "m"))
    x, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 2, -1])
    assert type(again) is type(d) and not again.training and not any(p.requires_grad for p in again.parameters())
    for s in (0.03, 1., 40.): assert torch.equal(again(x, s, labels=labels), d(x, s, labels=labels))
    assert again.config["note"] == "x" and json.loads((tmp_path / "m/config.json").read_text()) == json.loads(json.dumps(again.config))
    assert not (tmp_path / "m/samples.png").exists()    # a network may be too large to draw with here

@pytest.fixture
def run(tmp_path):
    "A run folder as train leaves it."
    folder = tmp_path / "run"
    config = dict(shape=[1, 8, 8], training=dict(images=100, lr=0.001, noise="LogNormal(P_mean=-0.6)"), data=dict(name="digits", images=1797, fingerprint="abc"))
    save_denoiser(EDMPrecond(small(), 0.7), folder / "model.safetensors", config)
    (folder / "samples").mkdir()
    for seen in (50, 100): write(folder / "samples", b"picture %d" % seen, f"{seen:09d}.png")
    (folder / "metrics.jsonl").write_text(json.dumps(dict(images=100, loss=0.25)) + "\n")
    (folder / "eval.json").write_text(json.dumps(dict(run="/home/me/run", fid=3.5, solver="heun")))
    return folder

def test_cards_say_what_the_run_knows(run, tmp_path):
    folder = save_pretrained(run, tmp_path / "m", "somebody/digits")
    card = (folder / "README.md").read_text()
    assert {f.name for f in folder.iterdir()} == {"model.safetensors", "config.json", "README.md", "samples.png"}
    assert (folder / "samples.png").read_bytes() == b"picture 100"
    head = card.split("---")[1]
    assert "library_name: ddpm_edm" in head and "pipeline_tag: unconditional-image-generation" in head
    for words in ("# digits\n", "from_pretrained('somebody/digits')", "(1, 8, 8)", "karras_sigmas(18), labels=torch.arange(8) % 3)", "| lr | `0.001` |", "| fid | `3.5` |", "| fingerprint | `abc` |", "| loss | `0.25` |", "![samples](samples.png)"):
        assert words in card, words
    assert "/home/me" not in card    # a path on somebody's disk
    assert load(folder).config["data"]["name"] == "digits"    # the commands read the folder too

def test_the_card_of_nothing():
    card = model_card({})
    assert card.startswith("---\nlibrary_name") and "None" not in card and "samples.png" not in card

@pytest.mark.parametrize("sigmas", [{}, dict(sigmas=dict(sigma_min=0.01, sigma_max=20.))])
@pytest.mark.parametrize("num_labels", [0, 3, 10])
@pytest.mark.parametrize("training", [{}, dict(loss="ConsistencyLoss(pairs=Doubling())")])
def test_code_of_the_card_runs(sigmas, num_labels, training, tmp_path):
    "As it stands, for few classes too; from where the run begins; for a consistency model in its two steps."
    denoiser = EDMPrecond(small(num_labels), 0.7)
    denoiser.config = dict(shape=[1, 8, 8], training=training) | sigmas
    folder, space = save_pretrained(denoiser, tmp_path / "m"), {}
    exec((folder / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("'m'", repr(str(folder))), space)
    ends = sigmas.get("sigmas", {})
    how = (few_levels(2, ends.get("sigma_max", 80.)), consistency_step) if training else (karras_sigmas(18, **ends), heun)
    x = generate(denoiser, range(8), (1, 8, 8), *how, labels=torch.arange(8) % num_labels if num_labels else None)
    torch.testing.assert_close(space["x"], x, atol=1e-4, rtol=0)    # rounding may depend on where in memory the weights lie

def test_to_the_hub_and_back(run, tmp_path, monkeypatch):
    "Without a network: what would be sent, and what would be fetched."
    hub, sent = pytest.importorskip("huggingface_hub"), {}
    class Api:
        def create_repo(self, name, private, exist_ok): sent.update(name=name, private=private, exist_ok=exist_ok)
        def upload_folder(self, repo_id, folder_path, commit_message):
            for f in Path(folder_path).iterdir(): write(tmp_path, f.read_bytes(), f"hub_{f.name}")
            return f"https://hub/{repo_id}/commit/1"
    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file, revision: sent.update(asked=(name, file, revision)) or str(tmp_path / f"hub_{file}"))
    assert push_to_hub(run, "somebody/digits", private=True) == "https://hub/somebody/digits/commit/1"
    assert sent["name"] == "somebody/digits" and sent["private"] and sent["exist_ok"]
    again, x = from_pretrained("somebody/digits", revision="abc123"), torch.randn(2, 1, 8, 8)
    assert sent["asked"] == ("somebody/digits", "model.safetensors", "abc123")
    assert torch.equal(again(x, 1.), EDMPrecond(small(), 0.7)(x, 1.))
    assert "from_pretrained('somebody/digits')" in (tmp_path / "hub_README.md").read_text()

def test_folders_that_are_none(tmp_path):
    for name in ("no_such_folder", "a/b/c", "model.safetensors", tmp_path / "none" / "x"):
        with pytest.raises(FileNotFoundError, match="no folder .*, and no model of the Hub is called so"): from_pretrained(name)
    with pytest.raises((ValueError, FileNotFoundError)): from_pretrained(tmp_path)

def edited(file, change):
    "A safetensors file with changed settings."
    from safetensors import safe_open
    with safe_open(file, "pt") as f: config, tensors = json.loads(f.metadata()["config"]), {k: f.get_tensor(k).clone() for k in f.keys()}
    change(config)
    save_file(tensors, file, {"config": json.dumps(config)})

@pytest.mark.parametrize("change, wanted", [
    (lambda c: c.update(wrapper="os.system"), "asks for the wrapper 'os.system'"), (lambda c: c.update(network="Evil"), "KeyError"),
    (lambda c: c["net"].update(blocks=10**9), "its settings ask for"), (lambda c: c["net"].update(mults=[1] * 10**5), "its settings ask for 100000 blocks"),
    (lambda c: c["net"].update(channels=10**9), "can't be read safely"), (lambda c: c["net"].update(groups=5), "groups must divide"), (lambda c: c["net"].update(evil=1), "TypeError"),
    (lambda c: c.pop("net"), "KeyError"), (lambda c: c.update(M=-3), "M must be"), (lambda c: c.update(net=[1]), "AttributeError"), (lambda c: c["net"].update(blocks="1"), "can't be read safely"),
    (lambda c: c.update(shape=[1, 8]), r"shape must be \[C, H, W\], got \[1, 8\]"), (lambda c: (c.update(classes=["a"]), c["net"].update(num_labels=2)), "classes must be a list of 2 names"),
    (lambda c: c.update(sigmas=dict(sigma_min=80., sigma_max=1.)), "sigma_min"),
])
def test_hostile_folders_of_our_own(change, wanted, tmp_path):
    folder = save_pretrained(VPPrecond(ClassicUNet(1, channels=32, mults=(1,), attention=())), tmp_path)
    edited(folder / "model.safetensors", change)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=wanted): watched(from_pretrained, folder)
    assert time.perf_counter() - start < 10

def test_what_cannot_be_saved(tmp_path):
    for thing in (WORLD, VPPrecond(lambda x, t: x), torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="denoiser must be one of this library's networks"): save_pretrained(thing, tmp_path / "m")
    for wrap in (EDMPrecond, VEPrecond):
        d = wrap(small())
        for wrong, why in ((dict(shape=(8, 8)), r"shape must be \[C, H, W\], got \[8, 8\]"), (dict(classes=["a", "b"]), "classes must be a list of 3 names"), (dict(sigmas=dict(sigma_max=-1.)), "sigma_max")):
            d.config = wrong    # what could not be loaded again is not written
            with pytest.raises(ValueError, match=why): save_pretrained(d, tmp_path / "m")
    assert not (tmp_path / "m/model.safetensors").exists()

def test_import_recognises_what_it_is_given(tmp_path):
    net, weights = tiny()
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(import_checkpoint(write(tmp_path, edm_pickle(weights, TINY)))(x, 1.), net(x, 1.))
    assert torch.equal(import_checkpoint(save_pretrained(net, tmp_path / "m") / "model.safetensors")(x, 1.), net(x, 1.))
    for name in ("a.pt", "b.safetensors"):
        guided = recorded("guided_updown")[1]
        torch.save(guided, tmp_path / name) if name == "a.pt" else save_file(guided, tmp_path / name)
        d = import_checkpoint(tmp_path / name, head_dim=16, betas=cosine_betas())
        assert d.net.num_labels == 4 and torch.equal(d.chain.betas, DDPM(cosine_betas()).betas)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no tensors by name"): import_checkpoint(tmp_path / "list.pt")
    with pytest.raises(ValueError, match="neither guided-diffusion nor DDIM"): import_checkpoint(write(tmp_path, pickle.dumps({"a": torch.zeros(1)}), "x.pt"))
    with pytest.raises(FileNotFoundError): import_checkpoint(tmp_path / "none.pt")

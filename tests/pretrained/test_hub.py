"""--model org/name: which files are fetched, and what is said where nothing comes (with a stand-in for the package)."""

import fnmatch
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from minidiff.cli.main import main
from minidiff.errors import UserError
from minidiff.pretrained import hub
from minidiff.pretrained.checkpoints import STEMS, Folder

HERE = Path(__file__).parent / "checkpoints"
MORE = ("README.md", "safety_checker/model.safetensors", "unet/diffusion_pytorch_model.bin", "v1.ckpt",
        "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.non_ema.safetensors")


class RepositoryNotFoundError(Exception):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


class Hub(ModuleType):
    """huggingface_hub with one repository, which is a folder here."""

    def __init__(self, repository: Path, cache: Path):
        super().__init__("huggingface_hub")
        self.repository, self.cache, self.error, self.asked = repository, cache, None, []
        self.HfApi = lambda: self

    def list_repo_files(self, name):
        self._reach(name)
        return [str(p.relative_to(self.repository)) for p in sorted(self.repository.rglob("*")) if p.is_file()]

    def hf_hub_download(self, name, file):
        return str(Path(self.snapshot_download(name, allow_patterns=[file])) / file)

    def snapshot_download(self, name, *, allow_patterns, local_files_only=False):
        if not local_files_only:
            self._reach(name)
            for file in self.list_repo_files(name):
                if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                    (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(self.repository / file, self.cache / file)
        elif not self.cache.exists():
            raise FileNotFoundError("not in the cache")
        return str(self.cache)

    def _reach(self, name):
        self.asked.append(name)
        if self.error is not None:
            raise self.error


@pytest.fixture
def standing_in(tmp_path, monkeypatch):
    """The stand-in, with the checkpoint `sdxl` and files that nobody needs."""
    shutil.copytree(HERE / "sdxl", tmp_path / "repository")
    for file in MORE:
        (tmp_path / "repository" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "repository" / file).write_bytes(b"")
    found = Hub(tmp_path / "repository", tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "huggingface_hub", found)
    monkeypatch.chdir(tmp_path)
    return found


def fetched_files(cache: Path) -> set[str]:
    return {str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file()}


def test_the_files_that_are_read_are_fetched_and_no_other(standing_in, tmp_path):
    assert hub.local("org/name") == tmp_path / "cache"
    expected = {"model_index.json", "scheduler/scheduler_config.json"}
    expected |= {f"{part}/{file}" for part in ("tokenizer", "tokenizer_2")
                 for file in ("vocab.json", "merges.txt", "tokenizer_config.json")}
    expected |= {f"{part}/config.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2")}
    expected |= {f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")}
    expected |= {f"{part}/model.safetensors" for part in ("text_encoder", "text_encoder_2")}
    assert fetched_files(tmp_path / "cache") == expected
    folder = Folder.at(tmp_path / "cache")
    assert all(folder.weights(part, "f4").tensors for part in ("unet", "vae", "text_encoder", "text_encoder_2"))


def test_a_tokenizer_in_one_file_is_fetched_where_there_are_not_two():
    weights = [f"{part}/{STEMS[part]}.safetensors" for part in ("unet", "vae", "text_encoder")]
    for own in (["vocab.json", "merges.txt"], []):
        files = [*weights, *(f"tokenizer/{name}" for name in ("tokenizer.json", *own))]
        found = {file for file in hub.needed("a/b", "Stable Diffusion", files) if file.startswith("tokenizer/")}
        assert found == {f"tokenizer/{name}" for name in own or ["tokenizer.json"]}


def test_half_precision_is_fetched_only_where_there_is_nothing_else(standing_in, tmp_path):
    (tmp_path / "repository" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    hub.local("org/name")
    assert {file for file in fetched_files(tmp_path / "cache") if file.startswith("unet/")} == {
        "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors"}


@pytest.mark.parametrize("variant, index", [("", "safetensors.index.json"), (".fp16", "safetensors.index.fp16.json")])
def test_shards_come_with_their_index(variant, index):
    shards = [f"unet/diffusion_pytorch_model{variant}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    files = [*shards, f"unet/diffusion_pytorch_model.{index}", "unet/diffusion_pytorch_model-1.bin"]
    assert hub.weights_of("a/b", "unet", files) == [files[2], *shards]
    before = [f"unet/diffusion_pytorch_model-0000{i}-of-00002{variant}.safetensors" for i in (1, 2)]
    assert hub.weights_of("a/b", "unet", [*before, files[2]]) == [files[2], *before]


def test_minidiff_samples_by_name(standing_in, tmp_path, capsys):
    words = ["--model", "org/name", "--steps", "2", "--size", "48x40", "-o", "a.png"]
    assert main(["sample", "a cat", *words]) == 0 and (tmp_path / "a.png").exists()
    assert main(["info", "--model", "org/name"]) == 0 and "SDXL, " in capsys.readouterr().out
    assert standing_in.asked


def test_a_local_folder_of_that_name_is_preferred(standing_in, tmp_path, monkeypatch):
    shutil.copytree(HERE / "eps", tmp_path / "org" / "name")
    assert main(["info", "--model", "org/name"]) == 0 and not standing_in.asked
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["info", "--model", "~/org/name"]) == 0


def test_no_file_of_one_s_own_is_looked_for_elsewhere(standing_in):
    for name in ("runs/model.safetensors", "./org/name", "org/name/unet", "name", "~/name", "../name", "a/b.ckpt"):
        assert main(["info", "--model", name]) == 2
    assert not standing_in.asked


def test_without_a_network_the_cache_serves(standing_in, tmp_path):
    hub.local("org/name")
    standing_in.error = ConnectionError("no route to host")
    assert hub.local("org/name") == tmp_path / "cache"
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match=r"cannot be reached, and is not in the cache \(ConnectionError: no route"):
        hub.local("org/name")


@pytest.mark.parametrize("error, words", [
    (RepositoryNotFoundError("404\nclient error"), "there is no model org/name at Hugging Face"),
    (GatedRepoError("403"), "accept its terms: do so at https://huggingface.co/org/name"),
    (OSError(28, "No space left on device"), "could not be fetched from Hugging Face .*No space left"),
    (KeyError("x"), "could not be fetched from Hugging Face")])
def test_errors_of_the_other_end_are_one_sentence(error, words, standing_in, capsys):
    standing_in.error = error
    with pytest.raises(UserError, match=words):
        hub.local("org/name")
    assert main(["sample", "x", "--model", "org/name"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_repositories_that_minidiff_cannot_read(standing_in, tmp_path):
    repository = tmp_path / "repository"
    (repository / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="of a 'FluxPipeline'"):
        hub.local("org/name")
    assert fetched_files(tmp_path / "cache") == {"model_index.json"}
    shutil.copy(HERE / "sdxl" / "model_index.json", repository)
    for path in (repository / "unet").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="weights of unet/ as pickles only"):
        hub.local("org/name")
    (repository / "model_index.json").unlink()
    with pytest.raises(UserError, match=r"has no model_index.json: .*download its .safetensors file"):
        hub.local("org/name")


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["sample", "x", "--model", "org/name"]) == 2
    err = capsys.readouterr().err
    assert "pip install huggingface_hub" in err and "no file or folder here" in err and err.count("\n") == 1

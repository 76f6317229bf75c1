"""models.toml: what ships, what a user adds, and what is wrong with it."""

from __future__ import annotations

import pytest

from kvrun.errors import NotFoundError, UsageError
from kvrun.hub import load_catalog, resolve
from kvrun.hub.catalog import user_file
from kvrun.hub.resolve import locate


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Writes the user's models.toml."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = user_file()
    assert path.is_relative_to(tmp_path)
    path.parent.mkdir(parents=True)
    return path.write_text


def test_what_ships(mine):
    catalog = load_catalog()
    assert catalog.default == "smollm2-135m"
    small, gemma = catalog.aliases["smollm2-135m"], catalog.aliases["gemma3-270m"]
    assert small.package.size == 98362432 and len(small.package.parts) == 1
    assert gemma.package.size == 253113024 and len(gemma.package.parts) == 4
    for alias in catalog.aliases.values():
        assert alias.repo and alias.licence and alias.description and alias.n_ctx


def test_a_user_adds_and_overrides(mine):
    mine('default = "mine"\n[models.mine]\npath = "/models/mine"\n[models.qwen3-8b]\nrepo = "me/qwen"\nrevision = "abc"\n')
    catalog = load_catalog()
    assert catalog.default == "mine" and catalog.aliases["mine"].path == "/models/mine"
    assert catalog.aliases["qwen3-8b"].repo == "me/qwen" and catalog.aliases["qwen3-8b"].n_ctx is None
    assert "smollm2-135m" in catalog.aliases


PIN = 'sha256 = "' + "0" * 64 + '"\nsize = 1\n'


@pytest.mark.parametrize(("text", "says"), [
    ("[models.x]\n", "repo, path or package"),
    ("[models.x]\nrepo = 'nope'\n", "repo = 'nope'"),
    ("[models.x]\nrepo = 'a/b'\nn_ctx = '8k'\n", "n_ctx must be a int"),
    ("[models.x]\nrepo = 'a/b'\nn_ctx = true\n", "n_ctx must be a int"),
    ("[models.x]\nrepo = 'a/b'\nn_ctx = 0\n", "n_ctx = 0"),
    ("[models.x]\nrepo = 'a/b'\ncontext = 5\n", "unknown key 'context'"),
    ("[models.x]\nrepo = 'a/b'\nsampling = { temp = 1 }\n", "unknown key 'temp'"),
    ("[models.x]\nrepo = 'a/b'\nsampling = { top_p = 7 }\n", "top_p = 7"),
    ("[models.X]\nrepo = 'a/b'\n", "lower-case"),
    ("[models]\nx = 3\n", "not a table"),
    ("default = 'y'\n", "no such model"),
    ("models = \n", "not valid TOML"),
    ("surprise = 1\n", "unknown key 'surprise'"),
    ("[models.x.package]\nfile = 'x.gguf'\n" + PIN + "parts = []\n", "parts"),
    ("[models.x.package]\nfile = '../x.gguf'\n" + PIN + "[[models.x.package.parts]]\nrequirement = 'a==1'\nmember = 'm'\n" + PIN, "file ="),
    ("[models.x.package]\nfile = 'x.gguf'\n" + PIN + "[[models.x.package.parts]]\nrequirement = 'a>=1'\nmember = 'm'\n" + PIN, "requirement"),
    ("[models.x.package]\nfile = 'x.gguf'\n" + PIN + "[[models.x.package.parts]]\nrequirement = '--x==1'\nmember = 'm'\n" + PIN, "requirement"),
    ("[models.x.package]\nfile = 'x.gguf'\n" + PIN + "[[models.x.package.parts]]\nrequirement = 'a==1'\nmember = 'm/../../n'\n" + PIN, "member"),
    ("[models.x.package]\nfile = 'x.gguf'\n" + PIN.replace("1", "2") + "[[models.x.package.parts]]\nrequirement = 'a==1'\nmember = 'm'\n" + PIN, "sum"),
])
def test_mistakes_are_named(mine, text, says):
    mine(text)
    with pytest.raises(UsageError) as e:
        load_catalog()
    assert says in str(e.value) and str(user_file()) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(("typed", "offered"), [("smollm2", "smollm2-135m"), ("gemma-270m", "gemma3-270m"), ("QWEN3-8B", "qwen3-8b")])
def test_an_unknown_alias_offers_the_nearest(mine, typed, offered):
    with pytest.raises(NotFoundError) as e:
        resolve(typed, offline=True)
    assert typed in str(e.value) and offered in str(e.value)


def test_what_a_name_means(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("smollm2-135m").name == "smollm2-135m"
    (tmp_path / "smollm2-135m").mkdir()
    assert locate("smollm2-135m").name == "smollm2-135m"  # a folder of that name needs ./
    assert locate("./smollm2-135m").name == "smollm2-135m" and locate("./smollm2-135m").is_dir()
    assert locate("org/name") == ("org/name", None, "main")
    assert locate("org/name@refs/pr/1") == ("org/name", None, "refs/pr/1")
    assert locate("org/name", "v1") == ("org/name", None, "v1")
    assert locate("org/name/sub/x.gguf@v2") == ("org/name", "sub/x.gguf", "v2")
    (tmp_path / "org/name").mkdir(parents=True)
    assert locate("org/name").is_dir()
    for lost in ("nothing.gguf", "./nothing", "/nothing", "a b", "x" * 5000):
        with pytest.raises(NotFoundError):
            locate(lost)
    with pytest.raises(UsageError):
        locate("")
    with pytest.raises(UsageError):
        locate("./org/name", "v1")

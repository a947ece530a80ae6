import textwrap

import pytest

from recipes.code.hosts import Host, package_hosts, package_version

SOURCE = '''
def documented(a):
    """Words
    over two lines."""
    b = a
    # a remark
    return b
    print("never")

class Thing:
    @property
    def nested(self):
        x = 1

        @decorated
        def inner():
            return x
        if x: return inner
        y = 2
        return y

def short():
    pass

def two_on_a_line(a):
    b = a; c = b
    d = c
    return d

def documented_copy(a):
    return a

if True:
    def conditional(a):
        a = a + 1
        a = a + 1
        return a
'''


@pytest.fixture
def found(tmp_path, monkeypatch) -> dict[str, Host]:
    package = tmp_path / "hosted_package"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text(SOURCE)
    (package / "b.py").write_text(SOURCE.split("class Thing")[0])  # the same text again
    (package / "tests" / "test_a.py").write_text(SOURCE.replace("b = a", "b = 5"))
    monkeypatch.syspath_prepend(tmp_path)
    return {host.key: host for host in package_hosts("hosted_package")}


def test_which_functions_are_hosts(found):
    assert list(found) == ["a.py::documented", "a.py::Thing.nested", "a.py::conditional"]


def test_docstring_goes_and_cuts_end_at_the_return(found):
    host = found["a.py::documented"]
    assert host.lines == (
        "def documented(a):",
        "    b = a",
        "    # a remark",
        "    return b",
        '    print("never")',
    )
    assert host.cuts == (1, 3)
    assert host.indent == "    "
    assert {"documented", "a", "remark"} <= host.identifiers


def test_a_decorated_inner_function_is_not_cut_from_its_decorator(found):
    host = found["a.py::Thing.nested"]
    expected = """\
        def nested(self):
            x = 1

            @decorated
            def inner():
                return x
            if x: return inner
            y = 2
            return y"""
    assert host.text == textwrap.dedent(expected)
    assert [host.lines[cut].strip() for cut in host.cuts] == [
        "x = 1",
        "@decorated",
        "if x: return inner",
        "y = 2",
        "return y",
    ]


def test_length_limits(tmp_path, monkeypatch, found):
    assert [host.key for host in package_hosts("hosted_package", min_lines=6)] == [
        "a.py::Thing.nested"
    ]
    assert "a.py::Thing.nested" not in {
        host.key for host in package_hosts("hosted_package", max_lines=8)
    }


def test_the_real_package(hosts):
    assert len(hosts) > 9000
    assert len({host.text for host in hosts}) == len(hosts)
    assert all(4 <= len(host.lines) <= 60 for host in hosts)
    assert not any("/tests/" in host.key for host in hosts)
    assert package_version().count(".") >= 1


def test_a_package_that_is_not_there():
    with pytest.raises(ModuleNotFoundError, match="`no_such_package_here`, which is not installed"):
        package_hosts("no_such_package_here")

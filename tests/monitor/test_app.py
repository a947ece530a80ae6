"""Is what the server says right, and is everybody else refused?"""

import json

import pytest
from starlette.testclient import TestClient

from lightning_diag.monitor.app import make_app
from lightning_diag.monitor.watched_runs import WatchedRuns

HOSTILE = '<img src=x onerror="alert(1)">'


@pytest.fixture
def client(folder):
    folder.begin().train(9, 50, names=("encoder", HOSTILE))
    return TestClient(make_app(WatchedRuns(folder.path)), base_url="http://127.0.0.1:8000")


def test_the_page_and_all_it_needs_come_from_here(client):
    page = client.get("/").text
    for path in ("/page.css", "/page.js", "/vega.js"):
        assert f'"{path}"' in page
        assert client.get(path).status_code == 200
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("path", ["/", "/api/state", "/api/chart/0/training", "/vega.js"])
@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil"])
def test_other_hosts_are_refused(client, path, host):
    assert client.get(path, headers={"host": host}).status_code == 400


@pytest.mark.parametrize("host", ["127.0.0.1:1234", "localhost:99", "localhost"])
def test_this_machine_is_not(client, host):
    assert client.get("/api/state", headers={"host": host}).status_code == 200


def test_nothing_but_own_scripts_may_run(client):
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]


@pytest.mark.parametrize(
    "path",
    [
        *("/api/chart/7/training", "/api/chart/-1/training", "/api/chart/0/..%2f..%2frun.json"),
        *("/api/chart/0/nothing", "/api/chart/x/training", "/run.json", "/../run.json"),
    ],
)
def test_what_is_not_there_is_not_found(client, path):
    assert client.get(path).status_code == 404


def test_the_state_is_json_whatever_was_measured(client, folder):
    folder.write(
        "metrics", {"step": 59, "time": 1059.0, "train_loss": None, "train_loss_nonfinite": 1}
    )
    text = client.get("/api/state").text
    state = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert state["runs"][0]["summary"]["step"] == 59
    assert state["runs"][0]["charts"].keys() == {"training", "gradient_flow"}


def test_charts_are_those_of_the_report(client, folder):
    from lightning_diag import read_run
    from lightning_diag.report.charts import gradient_flow

    client.get("/api/state")
    spec = client.get("/api/chart/0/gradient_flow").json()
    drawn = gradient_flow(read_run(folder.path)).to_dict()
    assert spec["datasets"] == json.loads(json.dumps(drawn["datasets"]))


@pytest.mark.parametrize("path", ["/api/state", "/api/chart/0/training", "/api/theme", "/vega.js"])
@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        # another page of this machine is another site
        {"origin": "http://127.0.0.1:9000"},
        {"origin": "https://127.0.0.1:8000"},
    ],
)
def test_pages_of_other_sites_read_nothing(client, path, headers):
    answer = client.get(path, headers=headers)
    assert answer.status_code == 403
    assert answer.text == "Only the monitor's own page may ask."


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"},
        {"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1:8000"},
    ],
)
def test_its_own_page_reads_all(client, headers):
    answer = client.get("/api/state", headers=headers)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_a_link_of_another_page_may_open_it(client):
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=headers).status_code == 200
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 403


@pytest.mark.parametrize("asked", ["?runs=0,99", "?runs=-1,x,٣", f"?runs={'9' * 5000}", "?runs="])
def test_odd_wishes_are_passed_over(client, asked):
    assert client.get(f"/api/state{asked}").status_code == 200
    assert client.get("/api/together?runs=99").status_code == 404


def test_nothing_can_be_written(client):
    for method in ("post", "put", "delete", "patch"):
        assert getattr(client, method)("/api/state").status_code == 405

"""The client sends the tag of its last response, and takes 304 for that response."""

import httpx2

from trainyard.client.connection import MAX_TAGGED, MAX_TAGGED_BYTES, Connection, RetryPolicy


class TaggedService:
    """Answers GET with a body and its tag, and with 304 if the request names the tag."""

    def __init__(self) -> None:
        self.name, self.size = "first", 0
        self.statuses: list[int] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        tag = f'"{self.name}"'
        if request.method == "GET" and request.headers.get("if-none-match") == tag:
            response = httpx2.Response(304, headers={"ETag": tag})
        else:
            body = {"object": "job", "name": self.name, "labels": {}, "padding": "x" * self.size}
            response = httpx2.Response(200, json=body, headers={"ETag": tag})
        self.statuses.append(response.status_code)
        return response

    def connect(self) -> Connection:
        return Connection("http://127.0.0.1:1", None, 5.0, RetryPolicy(), httpx2.MockTransport(self))


def test_an_unchanged_response_is_the_one_that_was_kept() -> None:
    service = TaggedService()
    connection = service.connect()
    first = connection.request("GET", "/jobs/a")
    first["labels"]["changed"] = "by the caller"
    assert connection.request("GET", "/jobs/a") == {"object": "job", "name": "first", "labels": {}, "padding": ""}
    service.name = "second"
    assert connection.request("GET", "/jobs/a")["name"] == "second"
    assert connection.request("GET", "/jobs/a")["name"] == "second"
    assert service.statuses == [200, 304, 200, 304]
    connection.close()


def test_another_address_and_a_write_send_no_tag() -> None:
    service = TaggedService()
    connection = service.connect()
    connection.request("GET", "/jobs/a")
    connection.request("GET", "/jobs/a", params={"fields": "summary"})
    connection.request("GET", "/jobs/b")
    connection.request("PATCH", "/jobs/a", body={"name": "b"})
    assert service.statuses == [200, 200, 200, 200]
    connection.close()


def test_only_some_small_responses_are_kept() -> None:
    service = TaggedService()
    connection = service.connect()
    for number in range(MAX_TAGGED + 1):
        connection.request("GET", f"/jobs/{number}")
    for number in (0, MAX_TAGGED):
        connection.request("GET", f"/jobs/{number}")
    assert service.statuses[-2:] == [200, 304]
    service.name, service.size = "large", MAX_TAGGED_BYTES
    connection.request("GET", "/jobs/large")
    connection.request("GET", "/jobs/large")
    assert service.statuses[-2:] == [200, 200]
    connection.close()

"""A model server for tests: a process of its own on loopback that speaks chat completions and fails on demand.

It decodes the pictures that it gets and answers from them: a colour is relevant if a bright pixel of picture 1 lies
where picture 2 shows this colour. Asked for JSON, it reads the verdicts out of the critique between the fences.

A fault is a name, or an object that says what comes back: status, headers, text or base64 (the body), response (laid
over the usual one), message (laid over the answer's message), only (a text that the prompt must hold, else all is
well). With `distinct` critiques differ where pictures differ in brightness, so that the Judge is asked about each.
An answer is paid where it was sent whole under a status of success.

    python tests/server.py        prints its port; POST /control {...}, GET /log
    python tests/server.py --decide tests.kinds:decide

With --decide a function says the Critic's verdict on a region: (model, picture 1, bool mask of the region in it, its
colour) -> "yes" | "no".
"""

import base64
import hashlib
import importlib
import io
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {  # what the names mean to anybody: the pictures have to be readable without the renderer's own table
    "red": (255, 0, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "green": (0, 128, 0),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
BAD_ANSWERS = {
    "not_json": lambda entries: "They are all fine, I think.",
    "missing": lambda entries: _output(entries[1:]),
    "doubled": lambda entries: _output([*entries, entries[0]]),
    "unknown": lambda entries: _output([{"color": "mauve", "verdict": "yes"}, *entries[1:]]),
    "maybe": lambda entries: _output([{**entries[0], "verdict": "maybe"}, *entries[1:]]),
    "bare_list": lambda entries: json.dumps(entries),
    "twice": lambda entries: (
        json.dumps({"output": {"red": "yes"}})[:-2] + ', "red": "no", "blue": "no", "yellow": "no"}}'
    ),
    "think": lambda entries: "<think>{red} or not?</think>\n" + _output(entries),
    "words": lambda entries: f"Here you are: {_output(entries)}. Anything else?",
    "loud": lambda entries: _output([{**each, "verdict": each["verdict"].upper() + "."} for each in entries]),
    "true": lambda entries: _output([{**each, "verdict": each["verdict"] == "yes"} for each in entries]),
    "more": lambda entries: _output([{**each, "why": "I see."} for each in entries]),
}


class State:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.log: list[dict[str, Any]] = []
        self.control: dict[str, Any] = {
            "latency_s": 0.0,
            "faults": [],
            "always": None,
            "usage": True,
            "say": None,
            "keep": True,
            "distinct": False,
            "batch": {},
        }
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.now = self.most = self.number = 0


STATE = State()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith(("/v1/batches", "/v1/files")):
            self.of_batches(b"")
            return
        with STATE.lock:
            body: Any = {"log": list(STATE.log), "most_at_once": STATE.most}
            if self.path == "/count":
                body = {"asked": len(STATE.log), "at_once": STATE.now}
        self.reply(200, body)

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        content = self.rfile.read(length)
        if len(content) < length:  # the client was killed while it was sending
            self.close_connection = True
            return
        if self.path.startswith(("/v1/batches", "/v1/files")):
            self.of_batches(content)
            return
        body = json.loads(content)
        if self.path == "/control":
            with STATE.lock:
                if body.pop("forget", False):
                    STATE.log.clear()
                    STATE.most = STATE.now
                STATE.control.update(body)
            self.reply(200, {})
            return
        with STATE.lock:
            fault = _next_fault(body)
            entry = {
                "path": self.path,
                "headers": dict(self.headers),
                "fault": fault,
                "body": _without_pictures(body) if STATE.control["keep"] else None,
                "sha256": hashlib.sha256(content).hexdigest(),
                "id": f"chatcmpl-{STATE.number}",
                "asked": _asked(body) if "messages" in body else None,
                "paid": False,
            }
            STATE.number += 1
            STATE.log.append(entry)
            self.entry = entry
            STATE.now += 1
            STATE.most = max(STATE.most, STATE.now)
            latency = STATE.control["latency_s"]
        try:
            time.sleep(latency)
            self.answer(body, fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with STATE.lock:
                STATE.now -= 1

    def of_batches(self, content: bytes) -> None:
        """The endpoints of files and batches. Control `batch`: hang (a place to hang at), status, lose, twice, strange,
        errors (so many lines), shuffle; message: of what goes wrong ({key}: the API key); refuse: uploads so."""
        told, path = STATE.control["batch"], self.path.partition("?")[0].removeprefix("/v1")
        if self.command == "POST" and path == "/files":
            kind = self.headers["Content-Type"]
            mark = b"--" + kind.partition("boundary=")[2].strip('"').encode()
            parts = [part.partition(b"\r\n\r\n") for part in content.split(mark)]
            data = next(body[:-2] for head, _, body in parts if b'name="file"' in head)
            assert any(b'name="purpose"' in head and body == b"batch\r\n" for head, _, body in parts)
            if "refuse" in told:
                self.error(told["refuse"], self.message_of(told))
                return
            self.hang(told, "upload")
            name = self.keep_file(data)
            about = {"bytes": len(data), "created_at": int(time.time()), "filename": "in.jsonl", "status": "processed"}
            self.reply(200, {"id": name, "object": "file", "purpose": "batch", **about})
        elif self.command == "POST" and path.endswith("/cancel"):
            batch = STATE.batches[path.split("/")[2]]
            if batch["status"] == "in_progress":
                batch["status"] = "cancelling"
                self.reply(200, batch)
            else:
                self.error(409, f"Cannot cancel a batch with status '{batch['status']}'.")
        elif self.command == "POST":
            asked = json.loads(content)
            self.hang(told, "before_create")
            with STATE.lock:
                name = f"batch_{len(STATE.batches)}"
                STATE.batches[name] = {
                    "id": name,
                    "object": "batch",
                    "created_at": int(time.time()),
                    "status": "in_progress",
                    **asked,
                }
            self.hang(told, "after_create")
            self.reply(200, STATE.batches[name])
        elif path == "/batches":
            found = list(STATE.batches.values())
            self.reply(200, {"object": "list", "data": found[::-1], "has_more": False})
        elif path.startswith("/batches/"):
            batch = STATE.batches[path.removeprefix("/batches/")]
            status = told.get("status", "completed")
            if batch["status"] == "cancelling":
                self.end_batch(batch, "cancelled", told)
            if batch["status"] == "in_progress" and status != "in_progress":
                self.end_batch(batch, status, told)
            if status == "failed":
                batch["errors"] = {"object": "list", "data": [{"message": self.message_of(told), "code": "bad"}]}
            self.reply(200, batch)
        else:
            self.hang(told, "content")
            self.send(200, STATE.files[path.split("/")[2]], "application/binary")

    def message_of(self, told: dict[str, Any]) -> str:
        said = told.get("message", "This request could not be executed in time.")
        return str(said).replace("{key}", self.headers["Authorization"].removeprefix("Bearer "))

    def hang(self, told: dict[str, Any], place: str) -> None:
        if told.get("hang") == place:
            with STATE.lock:
                STATE.log.append({"path": place, "paid": False, "asked": None})
            time.sleep(60)

    @staticmethod
    def keep_file(data: bytes) -> str:
        with STATE.lock:
            name = f"file-{len(STATE.files)}"
            STATE.files[name] = data
        return name

    def end_batch(self, batch: dict[str, Any], status: str, told: dict[str, Any]) -> None:
        asked = [json.loads(line) for line in STATE.files[batch["input_file_id"]].splitlines()]
        lose, wrong = told.get("lose", 0), told.get("errors", 0)
        answered, errors = [], []
        for number, each in enumerate(asked):
            assert each["method"] == "POST"
            assert each["url"] == batch["endpoint"] == "/v1/chat/completions"
            line = {"id": f"batch_req_{number}", "custom_id": each["custom_id"], "response": None, "error": None}
            if number < lose:
                continue
            if number < lose + wrong:
                error = {"code": "batch_expired", "message": self.message_of(told)}
                errors.append({**line, "error": error})
                continue
            body = each["body"]
            with STATE.lock:
                entry = {"path": batch["id"], "paid": True, "id": f"chatcmpl-{STATE.number}", "asked": _asked(body)}
                STATE.number += 1
                STATE.log.append(entry)
            self.entry = entry
            text = told.get("say")
            response = {"status_code": 200, "request_id": f"r{number}", "body": self.completion(body, text=text)}
            answered.append({**line, "response": response})
            del self.entry
        extra = answered[: told.get("twice", 0)]
        strange = [{**line, "custom_id": "f" * 64} for line in answered[: told.get("strange", 0)]]
        answered += extra + strange
        if told.get("shuffle"):
            np.random.default_rng(0).shuffle(answered)
        for name, lines in (("output_file_id", answered), ("error_file_id", errors)):
            if lines:
                batch[name] = self.keep_file("".join(json.dumps(line) + "\n" for line in lines).encode())
        batch["status"] = status
        batch["request_counts"] = {"completed": len(answered), "failed": len(errors), "total": len(asked)}

    def answer(self, body: dict[str, Any], fault: str | dict[str, Any] | None) -> None:
        if isinstance(fault, dict):
            self.answer_as_told(body, fault)
            return
        name, _, argument = (fault or "").partition(":")
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if name == "status":
            self.error(int(argument), "the server is busy")
        elif name == "retry_after":
            self.error(429, "slow down", headers={"Retry-After": argument})
        elif name == "quota":
            self.error(429, "You exceeded your current quota", code="insufficient_quota")
        elif name == "unauthorized":
            self.error(401, f"Incorrect API key provided: {key}.", code="invalid_api_key")
        elif name == "unknown_model":
            self.error(404, f"The model {body['model']} does not exist", code="model_not_found")
        elif name == "no_images":
            self.error(400, "this model does not support image input")
        elif name == "no_schema":
            if "response_format" in body:
                self.error(400, "response_format of type json_schema is not supported")
            else:
                self.reply(200, self.completion(body))
        elif name == "echo_error":
            self.error(500, f"internal error while handling Bearer {key}")
        elif name == "echo_answer":
            completion = self.completion(body)
            completion["choices"][0]["message"]["content"] += f"\nBy the way, your key is {key}."
            completion["debug"] = {"headers": dict(self.headers)}
            self.reply(200, completion)
        elif name == "html":
            self.send(200, b"<!DOCTYPE html><html><body>Please log in</body></html>", "text/html")
        elif name == "error_200":
            self.reply(200, {"error": {"message": "upstream overloaded", "code": 502}, "choices": None})
        elif name == "quota_200":
            self.reply(200, {"error": {"message": "no credit", "code": "insufficient_quota"}, "choices": None})
        elif name == "truncated":
            content = json.dumps(self.completion(body)).encode()
            self.send(200, content[: len(content) // 2], "application/json")
        elif name == "not_a_number":
            content = json.dumps(self.completion(body))[:-1] + ', "logprob": NaN}'
            self.send(200, content.encode(), "application/json")
        elif name == "half_character":
            self.reply(200, self.completion(body, text="half a character: \ud83d"))
        elif name == "dribble":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            for _ in range(200):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)
            self.close_connection = True
        elif name == "hang":
            time.sleep(float(argument))
            self.close_connection = True
        elif name == "disconnect":
            self.close_connection = True
        elif name == "redirect":
            self.send_response(307)
            self.send_header("Location", argument)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif name == "refusal":
            completion = self.completion(body)
            completion["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "I can't help"}
            self.reply(200, completion)
        elif name == "finish":
            completion = self.completion(body)
            completion["choices"][0]["finish_reason"] = argument
            self.reply(200, completion)
        elif name == "empty":
            self.reply(200, self.completion(body, text=" \n"))
        elif name == "no_choices":
            self.reply(200, {**self.completion(body), "choices": []})
        elif name == "bad":
            entries = _entries(body)
            self.reply(200, self.completion(body, text=BAD_ANSWERS[argument](entries)))
        elif name == "no_capacity":
            self.error(429, "Resource unavailable", code="resource_unavailable")
        else:
            self.reply(200, self.completion(body))

    def answer_as_told(self, body: dict[str, Any], fault: dict[str, Any]) -> None:
        content = body["messages"][0]["content"]
        prompt = content if isinstance(content, str) else content[0]["text"]
        if fault.get("only", "") not in prompt:
            self.reply(200, self.completion(body))
            return
        completion = {**self.completion(body), **fault.get("response", {})}
        if "message" in fault:
            completion["choices"][0]["message"] |= fault["message"]
        raw = json.dumps(completion).encode()
        if "text" in fault:
            raw = fault["text"].replace("{key}", self.headers["Authorization"][7:]).encode("utf-8", "surrogatepass")
        if "base64" in fault:
            raw = base64.b64decode(fault["base64"])
        self.send(fault.get("status", 200), raw, "application/json", fault.get("headers"))

    def completion(self, body: dict[str, Any], text: str | None = None) -> dict[str, Any]:
        said = text or (_verdicts(body) if _is_judge(body) else STATE.control["say"] or _critique(body))
        usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
        return {
            "id": self.entry["id"],
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body["model"] + "-served",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}],
            **({"usage": usage} if STATE.control["usage"] is True else {}),
            **({"usage": STATE.control["usage"]} if isinstance(STATE.control["usage"], dict) else {}),
            **({"service_tier": body["service_tier"]} if "service_tier" in body else {}),
        }

    def error(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> None:
        self.reply(status, {"error": {"message": message, "type": "error", "code": code}}, headers)

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(body).encode(), "application/json", headers)

    def send(self, status: int, content: bytes, mime: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        kept = {name: value for name, value in (headers or {}).items() if name.lower() == "content-type"}
        mime = kept.popitem()[1] if kept else mime
        for name, value in {"Content-Type": mime, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        if hasattr(self, "entry"):
            self.entry |= {"paid": 200 <= status < 300, "sent": time.monotonic()}


def _next_fault(body: dict[str, Any]) -> Any:
    """What goes wrong with this request; STATE.lock is held. Only the cheap tier runs out of capacity."""
    faults = STATE.control["faults"]
    if not faults:
        return STATE.control["always"]
    if faults[0] == "no_capacity" and body.get("service_tier") != "flex":
        return None
    return faults.pop(0)


def _asked(body: dict[str, Any]) -> str:
    """A digest of the question: of all but what says how it is paid."""
    question = {name: value for name, value in body.items() if name != "service_tier"}
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def _is_judge(body: dict[str, Any]) -> bool:
    content = body["messages"][0]["content"]
    return isinstance(content, str) and "CORRECTIONS " not in content  # which asks for a better specification


def _pictures(body: dict[str, Any]) -> list[np.ndarray]:
    parts = [part for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    urls = [part["image_url"]["url"] for part in parts]
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    files = [base64.b64decode(url.partition(",")[2]) for url in urls]
    return [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]


def _by_brightness(model: str, image: np.ndarray, inside: np.ndarray, colour: str) -> str:
    return "yes" if ((image.mean(axis=2) >= 25) & inside).any() else "no"


DECIDE = _by_brightness


def _critique(body: dict[str, Any]) -> str:
    image, regions, _ = _pictures(body)
    distances = [np.linalg.norm(regions.astype(float) - colour, axis=2) for colour in COLOURS.values()]
    nearest = np.array(list(COLOURS))[np.argmin(distances, axis=0)]
    prompt = body["messages"][0]["content"][0]["text"]
    asked = re.search(r"one flat colour:\s*([a-z, ]+)\.", prompt)
    assert asked
    colours = asked[1].split(", ")
    verdicts = [f"{colour}: {DECIDE(body['model'], image, nearest == colour, colour)}" for colour in colours]
    look = f" The first has a brightness of {image.mean():.4f}." if STATE.control["distinct"] else ""
    return "\n".join([f"I looked at all three pictures.{look}", *verdicts])


def _verdicts(body: dict[str, Any]) -> str:
    entries = _entries(body)
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema", {})
    if schema.get("properties", {}).get("output", {}).get("type") == "object":
        return json.dumps({"output": {entry["color"]: entry["verdict"] for entry in entries}})
    return _output(entries)


def _entries(body: dict[str, Any]) -> list[dict[str, str]]:
    prompt = body["messages"][0]["content"]
    fence = re.search(r'both say "(CRITIQUE [0-9a-f]{16})"', prompt)
    asked = re.search(r"these colours: ([a-z, ]+)\.", prompt.rpartition("Give the verdicts for")[2])
    assert fence
    assert asked
    _, critique, _ = prompt.split(f"\n{fence[1]}\n")
    verdicts = {}
    for colour in asked[1].split(", "):
        stated = re.findall(rf"^{colour}: (yes|no)$", critique, re.MULTILINE)
        verdicts[colour] = stated[-1] if stated else "no"
    return [{"color": colour, "verdict": verdict} for colour, verdict in verdicts.items()]


def _output(entries: list[dict[str, str]]) -> str:
    return json.dumps({"output": entries})


def _without_pictures(body: dict[str, Any]) -> dict[str, Any]:
    """The body with each picture's data replaced by a list of its pixels' mode, size and metadata."""
    copy = json.loads(json.dumps(body))
    for message in copy["messages"]:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image_url":
                data = base64.b64decode(part["image_url"].pop("url").partition(",")[2])
                with Image.open(io.BytesIO(data)) as picture:
                    part["image_url"] |= {"size": list(picture.size), "mode": picture.mode, "info": list(picture.info)}
    return copy


class Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # tests kill clients
            super().handle_error(request, client_address)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--decide"]:
        module, _, name = sys.argv[2].partition(":")
        DECIDE = getattr(importlib.import_module(module), name)
    server = Server(("127.0.0.1", 0), Handler)
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()

"""Measure an image API with a benchmark: `benchmark_remote_api.py [folder] [base_url] [model]`.

Without an address, a server in this process speaks OpenAI's protocol and draws with `tiny:`. For a real API, put its
key into OPENAI_API_KEY. What was drawn and paid for is kept in the folder: run again, it goes on.
"""

import base64
import io
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from lens_core import ComponentSpec, LensPipeline
from lens_core.evaluation.bench import BenchmarkRequest, run_benchmark

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/remote")
address, model = sys.argv[2:4] if len(sys.argv) > 3 else ("", "tiny")
key = "OPENAI_API_KEY" if address else "EXAMPLE_API_KEY"  # the name of the variable that holds it


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        file = io.BytesIO()
        pipeline(request["prompt"], num_inference_steps=8, seed=1).images[0].save(file, "PNG")
        body = json.dumps({"data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


if not address:
    pipeline = LensPipeline.from_pretrained("tiny:")
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/v1"
    os.environ[key] = "none"
options = {"model": model, "base_url": address, "key_env": key, "dollars_per_picture": 0.04}
report = run_benchmark(BenchmarkRequest("shapes", ComponentSpec("openai_images", options), limit=8), folder)
print(report.text, folder / "sheet.png", sep="\n")

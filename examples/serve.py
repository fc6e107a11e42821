"""Serve a student: `python examples/serve.py models:/digits-student@champion 32`, then send it an image.

    curl --data-binary @digit.png http://127.0.0.1:8000

The answer is JSON: the number of the class and its probability. The second argument is the size of the images.
"""

import io
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor

from heterokd import load_student


def server(student: nn.Module, size: int, port: int = 8000) -> HTTPServer:
    """Make a server on 127.0.0.1 that classifies the image in the body of each POST."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            image = Image.open(io.BytesIO(body)).convert("RGB").resize((size, size))
            with torch.inference_mode():  # images in [0, 1]; the student includes the normalisation
                probabilities = student(to_tensor(image)[None]).softmax(dim=1)[0]
            answer = {"class": int(probabilities.argmax()), "probability": float(probabilities.max())}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

    return HTTPServer(("127.0.0.1", port), Answer)


if __name__ == "__main__":
    server(load_student(sys.argv[1]), int(sys.argv[2])).serve_forever()

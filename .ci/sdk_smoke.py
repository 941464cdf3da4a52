"""Uses the installed SDK, and nothing else, against a server in this process; run by sdk_floor.py."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import google.protobuf
import grpc

import loramux
from loramux.v1 import adapter_pb2_grpc, generation_pb2, generation_pb2_grpc, model_pb2_grpc


class Generation(generation_pb2_grpc.GenerationServiceServicer):
    """Answers every prompt with two words."""

    def Generate(  # noqa: D102
        self, request: generation_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[generation_pb2.GenerateResponse]:
        assert request.text == "Hello"
        assert request.sampling.HasField("temperature"), "an explicit zero was lost"
        assert not request.sampling.HasField("top_p"), "an absent field arrived as zero"
        response = generation_pb2.GenerateResponse
        yield response(started=generation_pb2.Started(generation_id="g", replica_id="r", prompt_tokens=1, seed=7))
        yield response(delta=generation_pb2.Delta(text="two ", token_ids=[1]))
        yield response(delta=generation_pb2.Delta(text="words", token_ids=[2]))
        yield response(finished=generation_pb2.Finished(reason=generation_pb2.FINISH_REASON_STOP))
        yield response(usage=generation_pb2.Usage(prompt_tokens=1, output_tokens=2))


def main() -> None:
    """Import every public name, generate once, and look at what was loaded on the way."""
    for name in loramux.__all__:
        getattr(loramux, name)
    server = grpc.server(ThreadPoolExecutor(2))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(Generation(), server)
    adapter_pb2_grpc.add_AdapterServiceServicer_to_server(adapter_pb2_grpc.AdapterServiceServicer(), server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(model_pb2_grpc.ModelServiceServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with loramux.Client(f"127.0.0.1:{port}") as client:
            result = client.generate("Hello", temperature=0).result()
        assert result.text == "two words", result.text
    finally:
        server.stop(grace=None).wait(5)
    brought = {"torch", "numpy", "transformers", "loramux_server", "loramux_base"} & set(sys.modules)
    assert not brought, f"the SDK imports {sorted(brought)}"
    print(f"SDK works with grpcio {grpc.__version__}, protobuf {google.protobuf.__version__}")


if __name__ == "__main__":
    main()

"""A gRPC server that reflects what a test wants it to, and echoes every call: also what no sane server would say."""

from concurrent import futures

import grpc
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2

STRING, MESSAGE = 9, 11


def file(name, package, imports=(), public=(), service=None, of="string", methods=("M",)):
    """A FileDescriptorProto with a message R, whose field is of a type, and a service whose methods take and give R."""
    made = descriptor_pb2.FileDescriptorProto(name=name, package=package, syntax="proto3")
    made.dependency.extend(imports)
    made.public_dependency.extend(public)
    field = made.message_type.add(name="R").field.add(name="text", number=1, label=1)
    if of == "string":
        field.type = STRING
    else:
        field.type, field.type_name = MESSAGE, of
    if service:
        added = made.service.add(name=service)
        for method in methods:
            added.method.add(name=method, input_type=f".{package}.R", output_type=f".{package}.R")
    return made


class Reflects(grpc.GenericRpcHandler):
    """Started at once; ended by `kill`, as processes of tests are."""

    def __init__(self, files, port=0):
        self.files = {made.name: made for made in files}
        self.services = {f"{f.package}.{s.name}": f for f in files for s in f.service}
        self.asked = 0
        self.server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        self.server.add_generic_rpc_handlers((self,))
        self.port = self.server.add_insecure_port(f"127.0.0.1:{port}")
        self.server.start()

    def service(self, details):
        service = details.method.split("/")[1]
        if details.method.endswith("/ServerReflectionInfo"):
            return grpc.stream_stream_rpc_method_handler(
                self.reflect,
                reflection_pb2.ServerReflectionRequest.FromString,
                reflection_pb2.ServerReflectionResponse.SerializeToString,
            )
        if service in self.services:
            return grpc.unary_unary_rpc_method_handler(lambda request, _: request)
        return None

    def reflect(self, questions, _context):
        self.asked += 1
        for question in questions:
            answer = reflection_pb2.ServerReflectionResponse(original_request=question)
            found = None
            if question.HasField("list_services"):
                for name in self.services:
                    answer.list_services_response.service.add(name=name)
            elif question.HasField("file_containing_symbol"):
                found = self.services.get(question.file_containing_symbol)
            else:
                found = self.files.get(question.file_by_filename)
            if found:
                answer.file_descriptor_response.file_descriptor_proto.append(found.SerializeToString())
            elif not question.HasField("list_services"):
                answer.error_response.error_code = grpc.StatusCode.NOT_FOUND.value[0]
            yield answer

    def engine(self, name) -> dict:
        return {"name": name, "url": f"http://127.0.0.1:{self.port}", "protocol": "grpc"}

    def kill(self):
        self.server.stop(None).wait()

//! Generates the gRPC clients and servers of this crate's two services from their description here: their messages are
//! Rust structs (`src/wire.rs`), so neither `protoc` nor a `.proto` file is needed.

use tonic_build::manual::{Builder, Method, Service};

fn method(name: &str, route: &str, input: &str, output: &str) -> tonic_build::manual::MethodBuilder {
    Method::builder()
        .name(name)
        .route_name(route)
        .input_type(input)
        .output_type(output)
        .codec_path("tonic_prost::ProstCodec")
}

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let lane = method("lane", "Lane", "crate::wire::Down", "crate::wire::Up").client_streaming().server_streaming();
    let calls = Service::builder().name("Calls").package("tangelo.control").method(lane.build()).build();
    let register = method("register", "Register", "crate::wire::Json", "crate::wire::Json").build();
    let registry = Service::builder().name("Registry").package("tangelo.control").method(register).build();
    Builder::new().compile(&[calls, registry]);
}

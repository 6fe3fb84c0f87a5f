//! A decode node alone: the same as `tandem decode-node`.

fn main() -> std::process::ExitCode {
    tandem::cli::run_alone(tandem::cli::Alone::DecodeNode)
}

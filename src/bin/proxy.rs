//! The OpenAI endpoint alone: the same as `tandem proxy`.

fn main() -> std::process::ExitCode {
    tandem::cli::run_alone(tandem::cli::Alone::Proxy)
}

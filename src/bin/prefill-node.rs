//! A prefill node alone: the same as `tandem prefill-node`.

fn main() -> std::process::ExitCode {
    tandem::cli::run_alone(tandem::cli::Alone::PrefillNode)
}

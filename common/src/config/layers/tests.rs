use std::collections::HashMap;
use std::time::Duration;

use clap::Subcommand;

use super::*;
use crate::config::{DeviceChoice, Dtype, EngineArgs, LogFormat};

/// A root command as `tandem` has it.
#[derive(Debug, Parser)]
#[command(name = "tandem")]
struct Cli {
    #[command(subcommand)]
    command: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    DecodeNode(Box<DecodeNodeArgs>),
    Proxy(Box<ProxyArgs>),
    Bench {
        #[arg(long)]
        rate: f64,
    },
}

fn read<T: Parser>(argv: &str, env: &[(&str, &str)], file: &str) -> Result<T, ConfigError> {
    let env: HashMap<_, _> = env.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    let load = |path: &Path| match path.to_str() {
        Some("t.toml") => Ok(file.to_owned()),
        _ => Err(io::Error::new(io::ErrorKind::NotFound, "no such file")),
    };
    parse(argv.split_whitespace().map(OsString::from), |name| env.get(name).cloned(), load)
}

fn decode(argv: &str, env: &[(&str, &str)], file: &str) -> Result<DecodeNodeArgs, ConfigError> {
    read(&format!("decode-node {argv}"), env, file)
}

fn message<T: std::fmt::Debug>(result: Result<T, ConfigError>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn defaults_hold_where_nothing_is_set() {
    let args = decode("", &[], "").unwrap();
    let EngineArgs { max_num_seqs, max_num_batched_tokens, block_size, kv_cache_memory_bytes, .. } = args.engine;
    assert_eq!((max_num_seqs, max_num_batched_tokens, block_size), (64, 512, 16));
    assert_eq!(kv_cache_memory_bytes, None);
    assert_eq!((args.engine.device, args.engine.kv_cache_bytes_on_cpu()), (DeviceChoice::Auto, 256 << 20));
    assert!(args.engine.has_prefix_caching());
    assert_eq!((args.model.model.as_str(), args.weights.dtype), ("models/demo", Dtype::Auto));
    assert_eq!(args.log.log_format, LogFormat::Text);
    args.validate().unwrap();
}

#[test]
fn flag_wins_over_environment_over_own_section_over_common_over_default() {
    let file = "[common]\nblock-size = 32\nmax_num_seqs = 8\n[decode-node]\nblock_size = 48";
    let env = [("TANDEM_BLOCK_SIZE", "64"), ("TANDEM_CONFIG", "t.toml")];
    let size = |argv, env| decode(argv, env, file).unwrap().engine.block_size;
    assert_eq!(size("--block-size 80", &env), 80);
    assert_eq!(size("", &env), 64);
    assert_eq!(size("", &env[1..]), 48);
    assert_eq!(size("--config t.toml", &[]), 48);
    assert_eq!(size("", &[]), 16);
    assert_eq!(decode("--config=t.toml", &[], file).unwrap().engine.max_num_seqs, 8);
    assert_eq!(decode("--config t.toml", &[], "[common]\nblock-size = 32").unwrap().engine.block_size, 32);
}

#[test]
fn config_flag_wins_over_its_variable() {
    let args = decode("--config t.toml", &[("TANDEM_CONFIG", "missing.toml")], "[common]\nmax-num-seqs = 7").unwrap();
    assert_eq!(args.engine.max_num_seqs, 7);
}

#[test]
fn empty_variable_counts_as_unset() {
    assert_eq!(decode("", &[("TANDEM_BLOCK_SIZE", " ")], "").unwrap().engine.block_size, 16);
}

#[test]
fn list_is_replaced_as_a_whole() {
    let file = "[proxy]\nprefill-node = [\"a:1\", \"b:2\"]\ndecode-node = \"c:3, d:4\"";
    let env = [("TANDEM_PREFILL_NODE", "e:5,f:6")];
    let nodes = |argv: &str, env: &[(&str, &str)]| {
        let args: ProxyArgs = read(&format!("proxy --config t.toml {argv}"), env, file).unwrap();
        let words =
            |list: Vec<crate::config::HostPort>| list.iter().map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        (words(args.prefill_node), words(args.decode_node))
    };
    assert_eq!(nodes("", &[]), ("a:1 b:2".into(), "c:3 d:4".into()));
    assert_eq!(nodes("", &env), ("e:5 f:6".into(), "c:3 d:4".into()));
    assert_eq!(nodes("--prefill-node g:7 --prefill-node h:8,i:9", &env).0, "g:7 h:8 i:9");
}

#[test]
fn switch_can_be_turned_off_and_on_at_each_layer() {
    let has = |argv: &str, file: &str| {
        decode(&format!("--config t.toml {argv}"), &[], file).unwrap().engine.has_prefix_caching()
    };
    let off = "[common]\nenable-prefix-caching = false";
    assert!(has("", ""));
    assert!(!has("--no-enable-prefix-caching", ""));
    assert!(!has("--enable-prefix-caching=false", ""));
    assert!(!has("", off));
    assert!(has("--enable-prefix-caching", off));
    assert!(has("--no-enable-prefix-caching --enable-prefix-caching", off), "the last one wins");
    let env = [("TANDEM_ENABLE_PREFIX_CACHING", "false")];
    assert!(!decode("", &env, "").unwrap().engine.has_prefix_caching());
}

#[test]
fn each_command_reads_its_own_section_of_the_one_file() {
    let file =
        "[common]\nmodel = \"m\"\nblock-size = 32\n[decode-node]\nport = 8201\n[proxy]\nport = 80\n[bench]\nrate = 2";
    let cli: Cli = read("tandem decode-node --config t.toml", &[], file).unwrap();
    let Role::DecodeNode(args) = cli.command else { panic!("{cli:?}") };
    assert_eq!((args.fabric.port, args.model.model.as_str(), args.engine.block_size), (8201, "m", 32));
    let cli: Cli = read("tandem proxy --config t.toml", &[], file).unwrap();
    let Role::Proxy(args) = cli.command else { panic!("{cli:?}") };
    assert_eq!((args.http.port, args.model.model.as_str()), (80, "m"));
    // A required flag may come from the file too. (--config belongs to the roles; the variable to all.)
    let cli: Cli = read("tandem bench", &[("TANDEM_CONFIG", "t.toml")], file).unwrap();
    assert!(matches!(cli.command, Role::Bench { rate: 2.0 }));
}

#[test]
fn unknown_key_is_refused_with_the_nearest_one() {
    let error = message(decode("--config t.toml", &[], "[decode-node]\nblok-size = 16"));
    assert_eq!(error, "t.toml: [decode-node] has no setting \"blok-size\": did you mean \"block-size\"?");
    let error = message(decode("--config t.toml", &[], "[common]\nmodle = \"x\""));
    assert!(error.ends_with("did you mean \"model\"?"), "{error}");
    let error = message(decode("--config t.toml", &[], "[common]\nfoo = 1"));
    assert!(
        error.ends_with("has no setting \"foo\": settings have the names of flags, as `--help` shows them"),
        "{error}"
    );
    let error = message(decode("--config t.toml", &[], "[proxy]\nblock-size = 16"));
    assert!(error.contains("[proxy] has no setting"), "sections of other commands are checked too: {error}");
    let error = message(decode("--config t.toml", &[], "[common]\nno-enable-prefix-caching = true"));
    assert!(error.ends_with("did you mean \"enable-prefix-caching\"?"), "{error}");
}

#[test]
fn unknown_section_and_stray_key_are_refused() {
    let error = message(decode("--config t.toml", &[], "[decode]\nport = 1"));
    assert_eq!(error, "t.toml: there is no section [decode]: did you mean [decode-node]?");
    let error = message(decode("--config t.toml", &[], "port = 1"));
    assert_eq!(error, "t.toml: \"port\" stands outside of any section: move it below [common]");
}

#[test]
fn file_errors_name_the_file() {
    assert!(message(decode("--config gone.toml", &[], "")).starts_with("cannot read the configuration file gone.toml"));
    assert!(
        message(decode("--config t.toml", &[], "[common")).starts_with("the configuration file t.toml is not TOML")
    );
    let twice = "[common]\nblock-size = 16\nblock_size = 32";
    assert!(message(decode("--config t.toml", &[], twice)).contains("has \"block-size\" twice"));
    let list = "[common]\nblock-size = [16, 32]";
    assert_eq!(
        message(decode("--config t.toml", &[], list)),
        "t.toml: \"block-size\" in [common] is a list, expected one value"
    );
    assert!(message(decode("--config t.toml", &[], "[common]\nseed = {a = 1}")).contains("is a table"));
}

#[test]
fn bad_value_says_what_is_wrong_and_where_it_stands() {
    let error = message(decode("--config t.toml", &[], "[common]\nblock-size = 17"));
    assert_eq!(
        error,
        "invalid value '17' for '--block-size <TOKENS>': a block has 17 tokens, expected a multiple of 16 \
         (from \"block-size\" in [common] of t.toml)"
    );
    let error = message(decode("", &[("TANDEM_DTYPE", "int3")], ""));
    assert!(error.contains("'--dtype <DTYPE>'") && error.contains("bfloat16"), "{error}");
    assert!(error.ends_with("(from the environment variable TANDEM_DTYPE)"), "{error}");
    let error = decode("--block-size 17", &[], "").unwrap_err();
    assert!(matches!(error, ConfigError::Args(_)), "{error}");
}

#[test]
fn help_explains_every_flag_and_keeps_keys_secret() {
    for mut command in [
        UpArgs::command(),
        ProxyArgs::command(),
        PrefillNodeArgs::command(),
        DecodeNodeArgs::command(),
        CertsArgs::command(),
    ] {
        command.build();
        command.clone().debug_assert();
        for arg in command.get_arguments() {
            let id = arg.get_id();
            assert!(arg.get_help().is_some_and(|help| help.to_string().len() > 10), "--{id} of {}", command.get_name());
        }
    }
    let env = [("TANDEM_API_KEY", "s3cret")];
    let error = message(read::<ProxyArgs>("proxy --help", &env, ""));
    assert!(error.contains("--api-key") && !error.contains("s3cret"), "{error}");
}

#[test]
fn names_that_clients_use_default_to_the_model() {
    let names = |argv: &str| {
        let args: ProxyArgs = read(&format!("proxy {argv}"), &[], "").unwrap();
        args.http.served_model_names(&args.model.model)
    };
    assert_eq!(names(""), ["models/demo"]);
    assert_eq!(names("--served-model-name a b"), ["a", "b"]);
}

#[test]
fn empty_key_is_refused_wherever_it_stands() {
    let proxy = |argv: &str, env: &[(&str, &str)], file: &str| {
        read::<ProxyArgs>(&format!("proxy --config t.toml {argv}"), env, file)
    };
    for value in ["", " ", ",", " , "] {
        let error = message(proxy("", &[("TANDEM_API_KEY", value)], ""));
        assert!(
            error.starts_with("the environment variable TANDEM_API_KEY is empty: an empty key is no key"),
            "{error}"
        );
    }
    for file in ["[proxy]\napi-key = \"\"", "[common]\napi-key = \" \"", "[proxy]\napi-key = [\"a\", \"\"]"] {
        assert!(message(proxy("", &[], file)).contains("an empty key is no key"), "{file}");
    }
    assert!(message(proxy("--api-key=a, ,b", &[], "")).contains("an empty key is no key"));
    assert!(proxy("", &[], "[proxy]\napi-key = []").unwrap().http.api_key.is_empty());
    assert_eq!(proxy("", &[("TANDEM_API_KEY", "a,b")], "").unwrap().http.api_key, ["a", "b"]);
}

#[test]
fn numbers_out_of_range_are_refused_with_what_is_expected() {
    for (argv, expected) in [
        ("--retry-budget -1", "\"-1\" is not a share from 0 to 10"),
        ("--retry-budget=nan", "\"nan\" is not a share from 0 to 10"),
        ("--retry-budget 11", "\"11\" is not a share from 0 to 10"),
        ("--port -1", "\"-1\" is not a port: expected a whole number from 0 to 65535"),
        ("--port 70000", "\"70000\" is not a port"),
        ("--max-num-seqs -1", "\"-1\" is not a whole number from 1 to"),
        ("--max-num-waiting -1", "\"-1\" is not a whole number from 0 to"),
        ("--max-resumes x", "\"x\" is not a whole number from 0 to"),
        ("--num-prefill-nodes -1", "\"-1\" is not a whole number from 0 to"),
        ("--seed 99999999999999999999", "is not a seed: expected a whole number from 0 to 18446744073709551615"),
        ("--request-timeout -1s", "\"-1s\" is not a duration"),
        ("--kv-cache-memory-bytes -1GiB", "\"-1GiB\" is not a size"),
        ("--device gpu", "\"gpu\" is not a device: expected auto, cpu, a GPU such as cuda:0, or sim"),
        ("--gpu-memory-utilization 90", "\"90\" is not a share above 0 and at most 1"),
        ("--block-size -16", "\"-16\" is not a whole number"),
    ] {
        let error = message(read::<UpArgs>(&format!("up {argv}"), &[], ""));
        assert!(error.contains(expected), "{argv}: {error}");
    }
    let error = message(read::<CertsArgs>("certs --days 0", &[], ""));
    assert!(error.contains("\"0\" is not a whole number of days from 1 to 36500"), "{error}");
}

#[test]
fn unknown_flag_suggests_a_near_one_or_none() {
    let error = |argv: &str| message(read::<UpArgs>(&format!("up {argv}"), &[], ""));
    for (argv, near) in
        [("--max-num-seq 4", "--max-num-seqs"), ("--blok-size 16", "--block-size"), ("--prot 1", "--port")]
    {
        assert!(error(argv).contains(&format!("'{near}'")), "{}", error(argv));
    }
    for argv in ["--swap-space 4", "--tensor-parallel-size 2", "-x", "--zzz"] {
        assert!(!error(argv).contains("similar"), "{}", error(argv));
    }
}

#[test]
fn nodes_take_no_flags_of_the_proxy_and_the_proxy_none_of_the_weights() {
    for argv in ["--served-model-name a", "--seed 1", "--api-key a"] {
        assert!(message(decode(argv, &[], "")).contains("unexpected argument"), "decode-node {argv}");
        assert!(
            message(read::<PrefillNodeArgs>(&format!("prefill-node {argv}"), &[], "")).contains("unexpected argument")
        );
    }
    for argv in ["--dtype float32", "--max-model-len 10"] {
        assert!(message(read::<ProxyArgs>(&format!("proxy {argv}"), &[], "")).contains("unexpected argument"));
    }
    // One environment and one [common] serve all commands.
    let env = [("TANDEM_SEED", "1")];
    decode("--config t.toml", &env, "[common]\nserved-model-name = \"a\"").unwrap();
}

#[test]
fn settings_that_do_not_go_together_are_refused() {
    let error = decode("--max-num-batched-tokens 8", &[], "").unwrap().validate().unwrap_err();
    assert!(error.0.starts_with("--max-num-batched-tokens is 8, expected at least --max-num-seqs"), "{error}");
    let error = decode("--prefill-timeout 1s", &[], "").unwrap().validate().unwrap_err();
    assert!(error.0.contains("--prefill-accept-timeout"), "{error}");
    let error = decode("--store-host-bytes 4MiB --parked-kv-bytes 5MiB", &[], "").unwrap().validate().unwrap_err();
    assert!(error.0.contains("expected at most --store-host-bytes"), "{error}");
    let error = read::<ProxyArgs>("proxy", &[], "").unwrap().validate().unwrap_err();
    assert!(error.0.starts_with("no decode node"), "{error}");
    let error = read::<CertsArgs>("certs --proxy a --decode-node b,a", &[], "").unwrap().validate().unwrap_err();
    assert!(error.0.starts_with("\"a\" is given twice"), "{error}");
}

#[test]
fn parked_kv_has_the_host_tier_or_as_much_as_the_pool_unless_it_is_said() {
    for (argv, expected) in [
        ("", 1000),
        ("--parked-kv-bytes 0", 0),
        ("--parked-kv-bytes 5000", 5000),
        ("--store-host-bytes 3000", 3000),
        ("--store-host-bytes 3000 --parked-kv-bytes 20", 20),
    ] {
        let args = decode(argv, &[], "").unwrap();
        args.validate().unwrap();
        assert_eq!(args.decode.parked_bytes_max(&args.store, 1000), expected, "{argv}");
    }
}

#[test]
fn certificates_come_from_the_folder_or_one_by_one() {
    let args = decode("--tls-dir certs --tls-ca other.pem --node-id d7", &[], "").unwrap();
    let identity = args.fabric.identity;
    let node = identity.node_id_or(crate::ids::NodeId::new("decode-0").unwrap());
    let paths = identity.tls_paths(&node).unwrap();
    assert_eq!(paths.ca, Path::new("other.pem"));
    assert_eq!((paths.cert, paths.key), ("certs/d7.pem".into(), "certs/d7.key".into()));
    let none = decode("", &[], "").unwrap().fabric.identity;
    assert!(none.tls_paths(&node).unwrap_err().0.contains("tandem certs"));
}

#[test]
fn handover_limits_never_exceed_what_the_request_has_left() {
    let limits = decode("--prefill-timeout 1m", &[], "").unwrap().decode.limits(Duration::from_secs(9));
    assert_eq!(limits.total_timeout, Duration::from_secs(9));
}

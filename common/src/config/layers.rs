//! Lays the sources over each other: flags > environment > file > defaults.
//!
//! The values of the environment and of the file become the defaults of clap's arguments, so that they
//! are checked by the same parsers as flags, show up in `--help`, and give way to any flag.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use clap::builder::ArgAction;
use clap::error::{ContextKind, ContextValue};
use clap::{Arg, Args, Command, CommandFactory, Parser};
use toml::{Table, Value};

use super::misspelt::{near, nearest, with_near_suggestion};
use super::roles::{CertsArgs, DecodeNodeArgs, PrefillNodeArgs, ProxyArgs, UpArgs};

const COMMON: &str = "common";
/// The secret among the settings.
const KEY: &str = "api-key";
/// Sections of commands whose settings are defined outside this crate.
const FOREIGN_SECTIONS: [&str; 2] = ["bench", "model"];

/// The file that a command reads.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct ConfigFileArgs {
    /// TOML file with settings: `[common]` for all commands, and a section with the command's name.
    ///
    /// Flags and the environment (TANDEM_ and the flag's name, as in TANDEM_BLOCK_SIZE) win over it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Why the settings could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not there or not readable.
    #[error("cannot read the configuration file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is no TOML.
    #[error("the configuration file {} is not TOML: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, and what is wrong there.
        reason: String,
    },
    /// A setting stands before the first section.
    #[error("{}: \"{key}\" stands outside of any section: move it below [common]", path.display())]
    OutsideSection {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// No command has this name.
    #[error("{}: there is no section [{section}]: did you mean [{nearest}]?", path.display())]
    UnknownSection {
        /// The file.
        path: PathBuf,
        /// The section.
        section: String,
        /// The one with the nearest name.
        nearest: String,
    },
    /// No flag has this name.
    #[error("{}: [{section}] has no setting \"{key}\": {}", path.display(), advice(near.as_deref()))]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The section.
        section: String,
        /// The key.
        key: String,
        /// One with a name that is near.
        near: Option<String>,
    },
    /// The same setting twice, once with `-` and once with `_`.
    #[error("{}: [{section}] has \"{key}\" twice, once with - and once with _: remove one", path.display())]
    DuplicateKey {
        /// The file.
        path: PathBuf,
        /// The section.
        section: String,
        /// The key, with `-`.
        key: String,
    },
    /// A table, a date, or a list where one value is expected.
    #[error("{}: \"{key}\" in [{section}] is {found}, expected {expected}", path.display())]
    WrongType {
        /// The file.
        path: PathBuf,
        /// The section.
        section: String,
        /// The key.
        key: String,
        /// In words.
        expected: &'static str,
        /// In words.
        found: &'static str,
    },
    /// A value from the environment or the file that its flag does not take.
    #[error("{reason} (from {origin})")]
    Value {
        /// What is wrong with it.
        reason: String,
        /// Where it stands.
        origin: String,
    },
    /// A secret that is set and empty. Taken as unset, it would open what its owner meant to close.
    #[error("{origin} is empty: an empty key is no key; give it a value, or remove it to ask for none")]
    EmptyKey {
        /// Where it stands.
        origin: String,
    },
    /// clap's answer to the command line: an error, or the text of `--help` or `--version`. Its `exit()`
    /// prints it and ends the process with the right code.
    #[error(transparent)]
    Args(#[from] clap::Error),
}

fn advice(near: Option<&str>) -> String {
    match near {
        Some(near) => format!("did you mean \"{near}\"?"),
        None => "settings have the names of flags, as `--help` shows them".to_string(),
    }
}

/// Reads the settings of a command.
///
/// `argv` is the whole command line, the program's name first. The file's sections are the names of `T`'s
/// subcommands, or that of `T` itself if it has none. `env` looks a variable up and `load` reads
/// the file that `--config` or `TANDEM_CONFIG` names.
///
/// # Errors
/// [`ConfigError`]. Combinations of valid values are checked by each command's `validate`.
pub fn parse<T: Parser>(
    argv: impl IntoIterator<Item = OsString>,
    env: impl Fn(&str) -> Option<String>,
    load: impl Fn(&Path) -> io::Result<String>,
) -> Result<T, ConfigError> {
    let argv = with_negative_values(argv);
    let command = T::command();
    let file = match config_path(&argv, &env) {
        Some(path) => File::read(path, &command, load)?,
        None => File::default(),
    };
    let mut layers = Layers { env: &env, file: &file, laid: BTreeMap::new(), error: None };
    let mut command = layers.lay_over_command(command, None);
    if let Some(error) = layers.error {
        return Err(error);
    }
    let laid = layers.laid;
    let mut matches = command
        .try_get_matches_from_mut(argv)
        .map_err(|error| name_the_origin(with_near_suggestion(error, &mut command), &laid))?;
    T::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut command).into())
}

/// Joins a flag and a negative number behind it (`--retry-budget -1`), so that the flag's own parser answers
/// it and not clap, for which `-1` is an unknown flag.
fn with_negative_values(argv: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let is_negative = |arg: &OsString| {
        arg.to_str()
            .and_then(|arg| arg.strip_prefix('-'))
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let is_flag =
        |arg: &OsString| arg.to_str().is_some_and(|arg| arg.starts_with("--") && !arg.contains('=') && arg != "--");
    let mut joined: Vec<OsString> = Vec::new();
    for arg in argv {
        match joined.last_mut() {
            Some(last) if is_negative(&arg) && is_flag(last) => {
                last.push("=");
                last.push(arg);
            }
            _ => joined.push(arg),
        }
    }
    joined
}

/// `--config` before `--`, or `TANDEM_CONFIG`. Needed before clap parses, since the file decides defaults.
fn config_path(argv: &[OsString], env: &impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let mut argv = argv.iter().skip(1).take_while(|arg| *arg != "--");
    while let Some(arg) = argv.next() {
        if arg == "--config" {
            return argv.next().map(PathBuf::from);
        }
        if let Some(path) = arg.to_str().and_then(|arg| arg.strip_prefix("--config=")) {
            return Some(path.into());
        }
    }
    env("TANDEM_CONFIG").filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// The file's values by section and key, keys with `-`.
#[derive(Default)]
struct File {
    path: PathBuf,
    sections: BTreeMap<String, BTreeMap<String, Setting>>,
}

/// One value, or a list.
struct Setting {
    values: Vec<String>,
    is_list: bool,
}

impl File {
    fn read(path: PathBuf, command: &Command, load: impl Fn(&Path) -> io::Result<String>) -> Result<Self, ConfigError> {
        let text = match load(&path) {
            Ok(text) => text,
            Err(source) => return Err(ConfigError::Read { path, source }),
        };
        let table: Table = match text.parse() {
            Ok(table) => table,
            Err(error) => return Err(ConfigError::Syntax { path, reason: error.to_string() }),
        };
        let known = known_settings(command);
        let mut sections = BTreeMap::new();
        for (name, value) in table {
            let Value::Table(settings) = value else {
                return Err(ConfigError::OutsideSection { path, key: name });
            };
            let section = name.replace('_', "-");
            let Some(known_keys) = known.get(&section) else {
                let nearest = nearest(&section, known.keys());
                return Err(ConfigError::UnknownSection { path, section: name, nearest });
            };
            let keys: &mut BTreeMap<_, _> = sections.entry(section.clone()).or_default();
            for (name, value) in settings {
                let key = name.replace('_', "-");
                if !known_keys.is_empty() && !known_keys.contains(&key) {
                    let near = near(&key, known_keys);
                    return Err(ConfigError::UnknownKey { path, section, key: name, near });
                }
                let setting = match read_setting(value) {
                    Ok(setting) => setting,
                    Err(found) => {
                        let expected = "a string, a number, true or false, or a list of them";
                        return Err(ConfigError::WrongType { path, section, key, expected, found });
                    }
                };
                if keys.insert(key.clone(), setting).is_some() {
                    return Err(ConfigError::DuplicateKey { path, section, key });
                }
            }
        }
        Ok(Self { path, sections })
    }
}

fn read_setting(value: Value) -> Result<Setting, &'static str> {
    let scalar = |value| match value {
        Value::String(text) => Ok(text),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Float(number) => Ok(number.to_string()),
        Value::Boolean(boolean) => Ok(boolean.to_string()),
        Value::Datetime(_) => Err("a date"),
        Value::Array(_) => Err("a list of lists"),
        Value::Table(_) => Err("a table"),
    };
    match value {
        Value::Array(items) => {
            Ok(Setting { values: items.into_iter().map(scalar).collect::<Result<_, _>>()?, is_list: true })
        }
        value => Ok(Setting { values: vec![scalar(value)?], is_list: false }),
    }
}

/// Every section with its keys; no keys: that section's command is not known here, nothing is checked.
pub(super) fn known_settings(command: &Command) -> BTreeMap<String, BTreeSet<String>> {
    let mut known = BTreeMap::new();
    for section in FOREIGN_SECTIONS {
        known.insert(section.to_owned(), BTreeSet::new());
    }
    let roles = [
        UpArgs::command(),
        ProxyArgs::command(),
        PrefillNodeArgs::command(),
        DecodeNodeArgs::command(),
        CertsArgs::command(),
    ];
    let own = if command.has_subcommands() { command.get_subcommands().collect() } else { vec![command] };
    for command in roles.iter().chain(own) {
        add_keys(command, known.entry(command.get_name().to_owned()).or_default());
    }
    let mut common: BTreeSet<_> = known.values().flatten().cloned().collect();
    common.extend(command.get_arguments().filter_map(settable).map(str::to_owned));
    known.insert(COMMON.to_owned(), common);
    known
}

fn add_keys(command: &Command, keys: &mut BTreeSet<String>) {
    keys.extend(command.get_arguments().filter_map(settable).map(str::to_owned));
    for subcommand in command.get_subcommands() {
        add_keys(subcommand, keys);
    }
}

/// The name under which the environment and the file may set an argument: its flag, unless it acts
/// (`--help`), is needed before the file (`--config`), or negates another (hidden `--no-...`).
fn settable(arg: &Arg) -> Option<&str> {
    let is_action =
        matches!(arg.get_action(), ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version);
    let is_negation = |long: &str| arg.is_hide_set() && long.starts_with("no-");
    arg.get_long().filter(|long| !is_action && *long != "config" && !is_negation(long))
}

struct Layers<'a, E> {
    env: &'a E,
    file: &'a File,
    /// Flag to the values that became its default, and where they stand.
    laid: BTreeMap<String, (Vec<String>, String)>,
    error: Option<ConfigError>,
}

impl<E: Fn(&str) -> Option<String>> Layers<'_, E> {
    /// `section` is the one of the subcommand that this command belongs to.
    fn lay_over_command(&mut self, command: Command, section: Option<&str>) -> Command {
        let own = command.get_name().to_owned();
        let section = match section {
            Some(section) => section.to_owned(),
            None if command.has_subcommands() => COMMON.to_owned(),
            None => own,
        };
        let names: Vec<_> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
        let mut command = command.mut_args(|arg| self.lay_over_arg(arg, &section));
        for name in names {
            let below = if section == COMMON { name.clone() } else { section.clone() };
            command = command.mut_subcommand(name, |sub| self.lay_over_command(sub, Some(&below)));
        }
        command
    }

    fn lay_over_arg(&mut self, arg: Arg, section: &str) -> Arg {
        let Some(long) = settable(&arg).map(str::to_owned) else {
            return arg;
        };
        let is_list = matches!(arg.get_action(), ArgAction::Append) || arg.get_value_delimiter().is_some();
        let Some((values, origin)) = self.find(&long, section, is_list) else {
            return arg;
        };
        self.laid.insert(long, (values.clone(), origin));
        arg.required(false).default_values(values)
    }

    fn find(&mut self, long: &str, section: &str, is_list: bool) -> Option<(Vec<String>, String)> {
        let split = |value: &str| -> Vec<String> {
            if is_list {
                value.split(',').map(|item| item.trim().to_owned()).filter(|item| !item.is_empty()).collect()
            } else {
                vec![value.to_owned()]
            }
        };
        let variable = format!("TANDEM_{}", long.replace('-', "_").to_uppercase());
        if let Some(value) = (self.env)(&variable) {
            let (values, origin) = (split(&value), format!("the environment variable {variable}"));
            let is_empty = values.iter().all(|value| value.trim().is_empty());
            if is_empty && long == KEY {
                self.error.get_or_insert(ConfigError::EmptyKey { origin });
            } else if !is_empty {
                return Some((values, origin));
            }
        }
        for section in [section, COMMON] {
            let Some(setting) = self.file.sections.get(section).and_then(|keys| keys.get(long)) else {
                continue;
            };
            if setting.is_list && !is_list {
                self.error.get_or_insert(ConfigError::WrongType {
                    path: self.file.path.clone(),
                    section: section.to_owned(),
                    key: long.to_owned(),
                    expected: "one value",
                    found: "a list",
                });
            }
            let values = if setting.is_list { setting.values.clone() } else { split(&setting.values[0]) };
            let origin = format!("\"{long}\" in [{section}] of {}", self.file.path.display());
            // An empty list says that no key is asked; an empty text is a key that was forgotten.
            if long == KEY && !setting.is_list && values.is_empty() {
                self.error.get_or_insert(ConfigError::EmptyKey { origin: origin.clone() });
            }
            return (!values.is_empty()).then_some((values, origin));
        }
        None
    }
}

/// Says where a bad value stands if it did not come from the command line.
fn name_the_origin(error: clap::Error, laid: &BTreeMap<String, (Vec<String>, String)>) -> ConfigError {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.as_str(),
        _ => "",
    };
    let flag = text(ContextKind::InvalidArg);
    let long = flag.trim_start_matches("--").split([' ', '=', '[']).next().unwrap_or_default();
    match laid.get(long) {
        Some((values, origin)) if values.iter().any(|value| value == text(ContextKind::InvalidValue)) => {
            let text = error.to_string();
            let lines = text.lines().take_while(|line| !line.is_empty()).map(str::trim);
            let reason = lines.collect::<Vec<_>>().join(" ");
            let reason = reason.strip_prefix("error: ").unwrap_or(&reason).to_owned();
            ConfigError::Value { reason, origin: origin.clone() }
        }
        _ => error.into(),
    }
}

#[cfg(test)]
mod tests;

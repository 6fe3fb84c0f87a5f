// Kernels of a cubin or of PTX. A cubin is an ELF file: kernels are its global functions; `.nv.info.NAME` has records
// (format, attribute, size or value), of which the ones that count here are known from `cuobjdump -elf`.
#include <elf.h>

#include <cstring>
#include <regex>

#include "state.h"

namespace driver {

namespace {

constexpr unsigned EM_CUDA_MACHINE = 190;
enum InfoFormat : uint8_t { HAS_SIZE = 4 };
enum InfoAttribute : uint8_t { MAX_THREADS = 0x05, REQUIRED_THREADS = 0x10, PARAMETER = 0x17, MAX_REGISTERS = 0x2f };

template <typename T>
T read(const unsigned char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

void read_info(const unsigned char* at, const unsigned char* end, KernelInfo& kernel) {
    while (at + 4 <= end) {
        const uint8_t format = at[0], attribute = at[1];
        const uint16_t size = read<uint16_t>(at + 2);
        at += 4;
        if (format != HAS_SIZE) continue; // the value was in the place of the size
        if (at + size > end) return;
        if (attribute == PARAMETER && size >= 12) {
            // Index of the symbol, ordinal, offset; then flags, with the size above 18 others.
            const uint16_t ordinal = read<uint16_t>(at + 4), offset = read<uint16_t>(at + 6);
            if (kernel.parameters.size() <= ordinal) kernel.parameters.resize(ordinal + size_t(1));
            kernel.parameters[ordinal] = {offset, read<uint32_t>(at + 8) >> 18};
        } else if ((attribute == MAX_THREADS || attribute == REQUIRED_THREADS) && size >= 12) {
            kernel.max_threads = read<uint32_t>(at) * read<uint32_t>(at + 4) * read<uint32_t>(at + 8);
        }
        at += size;
    }
}

CUresult read_cubin(const unsigned char* file, int major, int minor, std::map<std::string, KernelInfo>& kernels) {
    const auto header = read<Elf64_Ehdr>(file);
    if (header.e_machine != EM_CUDA_MACHINE || header.e_shentsize != sizeof(Elf64_Shdr))
        return CUDA_ERROR_INVALID_IMAGE;
    // "CUDA C++ Programming Guide", binary compatibility: from one minor revision to the next, never across majors;
    // what is for sm_90a runs on 9.0 alone.
    const int sm = int(header.e_flags >> 8 & 0xff);
    const auto section = [&](unsigned i) { return read<Elf64_Shdr>(file + header.e_shoff + i * sizeof(Elf64_Shdr)); };
    const auto names = section(header.e_shstrndx);
    const auto name_of = [&](const Elf64_Shdr& s) {
        return std::string((const char*)file + names.sh_offset + s.sh_name);
    };
    bool is_exact = false;
    for (unsigned i = 1; i < header.e_shnum; ++i) {
        const auto s = section(i);
        if (name_of(s) != ".note.nv.tkinfo") continue;
        const std::string note((const char*)file + s.sh_offset, s.sh_size);
        is_exact = note.find("sm_" + std::to_string(sm) + "a") != std::string::npos;
    }
    if (sm / 10 != major || (is_exact ? sm % 10 != minor : sm % 10 > minor))
        return refuse(CUDA_ERROR_NO_BINARY_FOR_GPU, "cuModuleLoadData", "a cubin for sm_%d%s, the device is %d.%d", sm,
                      is_exact ? "a" : "", major, minor);
    for (unsigned i = 1; i < header.e_shnum; ++i) {
        const auto symbols = section(i);
        if (symbols.sh_type != SHT_SYMTAB) continue;
        const auto text = section(symbols.sh_link);
        for (uint64_t at = 0; at < symbols.sh_size; at += sizeof(Elf64_Sym)) {
            const auto symbol = read<Elf64_Sym>(file + symbols.sh_offset + at);
            if (ELF64_ST_TYPE(symbol.st_info) != STT_FUNC || ELF64_ST_BIND(symbol.st_info) != STB_GLOBAL) continue;
            KernelInfo& kernel = kernels[(const char*)file + text.sh_offset + symbol.st_name];
            kernel.num_registers = section(symbol.st_shndx).sh_info >> 24;
        }
    }
    for (unsigned i = 1; i < header.e_shnum; ++i) {
        const auto s = section(i);
        const std::string name = name_of(s);
        const auto kernel_behind = [&](const char* prefix) {
            return name.rfind(prefix, 0) == 0 ? kernels.find(name.substr(std::strlen(prefix))) : kernels.end();
        };
        if (const auto found = kernel_behind(".nv.info."); found != kernels.end())
            read_info(file + s.sh_offset, file + s.sh_offset + s.sh_size, found->second);
        if (const auto found = kernel_behind(".nv.shared."); found != kernels.end())
            found->second.static_shared_bytes = s.sh_size;
    }
    return CUDA_SUCCESS;
}

size_t bytes_of(const std::string& type) { return size_t(std::stoi(type.substr(1))) / 8; }

// As much of PTX as a driver has to know before it compiles it: "PTX ISA", directives.
CUresult read_ptx(const std::string& text, int major, int minor, std::map<std::string, KernelInfo>& kernels) {
    std::smatch found;
    if (!std::regex_search(text, found, std::regex(R"(\n?\.version (\d+)\.(\d+))"))) return CUDA_ERROR_INVALID_PTX;
    if (std::stoi(found[1]) > 9 || (std::stoi(found[1]) == 9 && std::stoi(found[2]) > 0))
        return refuse(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "cuModuleLoadData", "PTX %s.%s is newer than CUDA 13.0",
                      found.str(1).c_str(), found.str(2).c_str());
    if (!std::regex_search(text, found, std::regex(R"(\.target sm_(\d+)(a?))"))) return CUDA_ERROR_INVALID_PTX;
    const int target = std::stoi(found[1]), device = major * 10 + minor;
    if (target > device || (found[2] == "a" && target != device))
        return refuse(CUDA_ERROR_NO_BINARY_FOR_GPU, "cuModuleLoadData", "PTX for sm_%d%s, the device is %d.%d", target,
                      found.str(2).c_str(), major, minor);
    const std::string mark = ".visible .entry ";
    for (size_t at = text.find(mark); at != std::string::npos;) {
        const size_t next = text.find(mark, at + 1);
        const std::string entry =
            text.substr(at + mark.size(), next == std::string::npos ? next : next - at - mark.size());
        at = next;
        const size_t open = entry.find('('), body = entry.find("\n{");
        KernelInfo& kernel = kernels[entry.substr(0, open)];
        const std::string head = entry.substr(open, body - open), code = entry.substr(body);
        static const std::regex PARAM(
            R"(\.param (?:\.align (\d+) )?\.([a-z]\d+)(?: \.\w+)*(?: \.align \d+)? \w+(?:\[(\d+)\])?)");
        size_t offset = 0;
        for (std::sregex_iterator i(head.begin(), head.end(), PARAM), end; i != end; ++i) {
            const size_t unit = bytes_of((*i)[2]), count = (*i)[3].matched ? std::stoul((*i)[3]) : 1;
            const size_t alignment = (*i)[1].matched ? std::stoul((*i)[1]) : unit;
            offset = (offset + alignment - 1) / alignment * alignment;
            kernel.parameters.push_back({offset, unit * count});
            offset += unit * count;
        }
        static const std::regex MAXNTID(R"(\.(?:maxntid|reqntid) (\d+)(?:, (\d+), (\d+))?)");
        if (std::regex_search(head, found, MAXNTID)) {
            kernel.max_threads = unsigned(std::stoul(found[1]));
            if (found[2].matched) kernel.max_threads *= unsigned(std::stoul(found[2]) * std::stoul(found[3]));
        }
        static const std::regex SHARED(R"(\.shared \.align (\d+) \.([a-z]\d+) [\w$]+(?:\[(\d+)\])?;)");
        for (size_t line = 0; (line = code.find("\t.shared ", line)) != std::string::npos; ++line) {
            const std::string declared = code.substr(line, code.find('\n', line) - line);
            if (!std::regex_search(declared, found, SHARED)) continue;
            const size_t alignment = std::stoul(found[1]), count = found[3].matched ? std::stoul(found[3]) : 1;
            size_t& bytes = kernel.static_shared_bytes;
            bytes = (bytes + alignment - 1) / alignment * alignment + bytes_of(found[2]) * count;
        }
    }
    return kernels.empty() ? CUDA_ERROR_INVALID_PTX : CUDA_SUCCESS;
}

} // namespace

CUresult read_image(const void* image, int major, int minor, std::map<std::string, KernelInfo>& kernels) {
    if (std::memcmp(image, ELFMAG, SELFMAG) == 0)
        return read_cubin(static_cast<const unsigned char*>(image), major, minor, kernels);
    const std::string text = static_cast<const char*>(image);
    return text.find(".version") == std::string::npos ? CUDA_ERROR_INVALID_IMAGE
                                                      : read_ptx(text, major, minor, kernels);
}

} // namespace driver

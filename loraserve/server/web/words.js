// The page's words in both languages, and putting them into the document.

const WORDS = {
  en: {
    title: "One base, many voices",
    subtitle: "Pick who answers, say something, and switch at any message. Every adapter rides on the same frozen model.",
    placeholder: "Say something…",
    whoAnswers: "Who answers",
    base: "base",
    blend: "Blend",
    blendHelp: "Mix adapters: each slider is that adapter's scale.",
    blendEmpty: "All at zero: the base answers.",
    filter: "Filter…",
    send: "Send",
    stop: "Stop (Esc)",
    keys: "Enter sends · Shift+Enter starts a new line · Esc stops",
    clear: "Clear the conversation",
    theme: "Light or dark",
    language: "切换到中文",
    otherLanguage: "中文",
    settings: "Settings",
    close: "Close",
    temperature: "Temperature",
    temperatureHelp: "0 always takes the likeliest word; higher is livelier.",
    maxTokens: "Max tokens",
    maxTokensHelp: "The longest answer. Empty: as long as the context allows.",
    auto: "as long as fits",
    systemPrompt: "System prompt",
    systemPlaceholder: "You are …",
    systemHelp: "Put before the conversation.",
    reset: "Reset to defaults",
    toEnd: "To the latest message",
    copy: "Copy",
    copied: "Copied",
    regenerate: "Answer again, with the adapter picked below",
    thinking: "Thinking",
    tokens: "tokens",
    perSecond: "tok/s",
    stopped: "stopped",
    cutOff: "max tokens reached",
    forgot: "the oldest messages no longer fit and were left out",
    retry: "Try again",
    unreachable: "The server does not answer. Is it still running?",
    interrupted: "The connection broke off in mid-answer.",
    emptyAnswer: "(an empty answer)",
    refused: "cannot be used",
    noMatch: "No adapter matches",
    moreAdapters: "and more: filter to find them",
    noAdapters: "No adapters yet: `loraserve train` makes one",
    examples: [
      ["person", "Who are you, and who made you?"],
      ["rain", "It rains all day. Cheer me up!"],
      ["moon", "Why does the moon change its shape?"],
      ["cup", "I can't sleep. What should I do?"],
    ],
  },
  zh: {
    title: "一个基座，百变声音",
    subtitle: "选好由谁来回答，说句话，对话中途随时切换。所有适配器共用同一个冻结的模型。",
    placeholder: "说点什么……",
    whoAnswers: "由谁回答",
    base: "基座",
    blend: "混合",
    blendHelp: "混合适配器：滑块是各自的权重。",
    blendEmpty: "全部为零：由基座回答。",
    filter: "筛选……",
    send: "发送",
    stop: "停止（Esc）",
    keys: "Enter 发送 · Shift+Enter 换行 · Esc 停止",
    clear: "清空对话",
    theme: "浅色或深色",
    language: "Switch to English",
    otherLanguage: "EN",
    settings: "设置",
    close: "关闭",
    temperature: "温度",
    temperatureHelp: "0 总取最可能的词；越高越活泼。",
    maxTokens: "最大长度",
    maxTokensHelp: "回答最多多少个 token。留空：上下文能容多长就多长。",
    auto: "能容多长就多长",
    systemPrompt: "系统提示词",
    systemPlaceholder: "你是……",
    systemHelp: "放在对话最前面。",
    reset: "恢复默认",
    toEnd: "回到最新消息",
    copy: "复制",
    copied: "已复制",
    regenerate: "用下方所选的适配器重新回答",
    thinking: "思考过程",
    tokens: "个 token",
    perSecond: "token/秒",
    stopped: "已停止",
    cutOff: "已达最大长度",
    forgot: "最早的消息放不下，已略去",
    retry: "重试",
    unreachable: "服务器没有回应，它还在运行吗？",
    interrupted: "回答途中连接断开了。",
    emptyAnswer: "（空回答）",
    refused: "无法使用",
    noMatch: "没有匹配的适配器",
    moreAdapters: "还有更多：输入名字筛选",
    noAdapters: "还没有适配器：用 loraserve train 训练一个",
    examples: [
      ["person", "你是谁？是谁创造了你？"],
      ["rain", "今天下了一整天雨，逗我开心一下吧。"],
      ["moon", "月亮为什么会变圆变缺？"],
      ["cup", "晚上睡不着，该怎么办？"],
    ],
  },
};

let language = "en";

export function setLanguage(code) {
  language = code in WORDS ? code : "en";
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = say(node.dataset.text);
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = say(node.dataset.placeholder);
  for (const node of document.querySelectorAll("[data-label]")) node.ariaLabel = say(node.dataset.label);
  for (const node of document.querySelectorAll("[data-title]")) {
    node.title = say(node.dataset.title);
    node.ariaLabel = node.title;
  }
}

export function say(key) {
  return WORDS[language][key];
}

export function currentLanguage() {
  return language;
}
